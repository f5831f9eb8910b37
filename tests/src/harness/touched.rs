//! Something else writes to the disk of a replica while its agent is down (X4). That it did is what the agent finds out before it
//! opens the volume, and records; the machines must bring the copy up to date by that.

use super::mirror::Image;
use super::world::World;
use blockmirror_protocol::disk::activity_log::{self, Recovered};

/// What no application writes.
const FOREIGN: u32 = u32::MAX;

impl World {
    /// At times the disk of a replica that is about to start has content of nobody.
    pub(super) fn touch(&mut self, host: usize) {
        let touches = self.settings.touches;
        let it = &self.hosts[host];
        let is_whole = it.mirror.image.is_some() && it.mirror.point.is_none() && it.kept.is_none();
        let is_whole = is_whole && it.disk.is_durable();
        if touches == 0 || !is_whole || !self.is_rough || !self.random.once_in(touches) {
            return;
        }
        let sector = self.random.below(self.settings.size_bytes / 512);
        self.note(|| format!("something else writes to sector {sector} of host {host}"));
        let it = &mut self.hosts[host];
        it.disk.replace(sector, FOREIGN.into());
        it.mirror.image = Some(Image::of_disk(&it.disk));
        let (Recovered::Active { serial, .. } | Recovered::Unsure { serial }) = it.recover_log();
        let record = activity_log::encode_everything(serial + 1);
        it.files.write_now(activity_log::FILE_NAME, activity_log::record_offset(serial + 1), &record);
        let it = &mut self.hosts[host];
        it.superblock.note_touched();
        it.write_superblock_now();
        self.differences.forget(host);
        for link in self.links.ids().filter(|link| link.listener == host) {
            self.links[link].united_by = None;
        }
    }
}
