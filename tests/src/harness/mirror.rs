//! What a replica's disk may hold, kept beside its machine and without looking into it: once its data are consistent,
//! the content at its last durable epoch, and any of the next one (W3, P1).
//!
//! It does not matter which host sends. Connections stand for sessions here, since their numbers never repeat.

use super::disk::{Data, Disk, Value, put, sectors};
use super::gap::{HistoryPoint, RollbackPoint};
use super::history::History;
use super::promises::Promises;
use blockmirror_protocol::layers::LayerId;
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::replica::StateChange;
use blockmirror_protocol::terms::DataState;
use blockmirror_protocol::units::{Epoch, Position, Sequence};
use std::collections::{BTreeMap, BTreeSet};

/// A connection and an epoch on it.
pub type EpochKey = (u64, u64);

/// Live frames as they were sent, by their epoch.
type Frames = BTreeMap<EpochKey, Vec<(ByteRange, Data)>>;

/// What a consistent replica may hold. What a legal image of the volume may hold.
#[derive(Clone, Debug)]
pub struct Image {
    base: BTreeMap<u64, Value>,
    /// What sectors may hold instead, because the primary lost a write when a sync failed.
    instead: BTreeMap<u64, BTreeSet<Value>>,
    frames: Frames,
    /// Sectors of which less is possible than when they were last checked.
    narrowed: BTreeSet<u64>,
}

impl Image {
    /// An image of sectors each of which may hold one of these.
    fn of(possible: &BTreeMap<u64, BTreeSet<Value>>) -> Self {
        let first = |values: &BTreeSet<Value>| values.first().copied().unwrap_or_default();
        Self {
            base: possible.iter().map(|(sector, values)| (*sector, first(values))).collect(),
            instead: possible.clone(),
            frames: Frames::new(),
            narrowed: BTreeSet::new(),
        }
    }

    /// The image that a disk holds on which nothing is being written.
    #[must_use]
    pub fn of_disk(disk: &Disk) -> Self {
        Self {
            base: disk.content().clone(),
            instead: BTreeMap::new(),
            frames: Frames::new(),
            narrowed: BTreeSet::new(),
        }
    }

    /// The image at a commit of a position in this history.
    #[must_use]
    pub fn new(history: &mut History, sequence: Sequence) -> Self {
        let base = history.content_at(sequence).clone();
        let instead = history.losses().clone();
        Self { base, instead, frames: Frames::new(), narrowed: BTreeSet::new() }
    }

    /// Epochs up to this one were acknowledged as durable.
    fn durable(&mut self, until: EpochKey) {
        while let Some(epoch) = self.frames.first_entry().filter(|epoch| *epoch.key() <= until) {
            for (range, data) in epoch.remove() {
                self.narrowed.extend(self.base.range(sectors(range)).map(|(sector, _)| *sector));
                self.narrowed.extend(data.not_zero(range).into_iter().map(|(sector, _)| sector));
                put(&mut self.base, range, &data);
                self.instead.retain(|sector, _| !sectors(range).contains(sector));
            }
        }
    }

    /// Something else wrote to a sector.
    fn something_else_wrote(&mut self, sector: u64, value: Value) {
        self.base.insert(sector, value);
        self.instead.remove(&sector);
    }

    /// Checks that a power loss at this moment leaves a legal image.
    ///
    /// # Panics
    /// When it might not.
    pub fn check(&mut self, disk: &Disk, host: usize) {
        self.check_with(disk, host, |_| None);
    }

    /// The same for a disk of which some sectors have a value that will be restored.
    ///
    /// # Panics
    /// When it might not.
    pub fn check_with(&mut self, disk: &Disk, host: usize, restored: impl Fn(u64) -> Option<Value>) {
        self.narrowed.clear();
        let touched: BTreeSet<u64> = disk.touched().into_iter().chain(self.base.keys().copied()).collect();
        touched.into_iter().for_each(|sector| self.check_sector(disk, host, sector, restored(sector)));
    }

    /// The same, where the disk has changed or less is possible than before.
    ///
    /// # Panics
    /// When it might not.
    pub fn check_changed(&mut self, disk: &Disk, changed: &[u64], host: usize) {
        self.check_changed_with(disk, changed, host, |_| None);
    }

    /// The same for a disk of which some sectors have a value that will be restored.
    ///
    /// # Panics
    /// When it might not.
    pub fn check_changed_with(
        &mut self,
        disk: &Disk,
        changed: &[u64],
        host: usize,
        restored: impl Fn(u64) -> Option<Value>,
    ) {
        let narrowed = std::mem::take(&mut self.narrowed);
        for sector in changed.iter().copied().chain(narrowed) {
            self.check_sector(disk, host, sector, restored(sector));
        }
    }

    fn check_sector(&self, disk: &Disk, host: usize, sector: u64, restored: Option<Value>) {
        let durable = self.base.get(&sector).copied().unwrap_or_default();
        let next = self.frames.first_key_value().map_or(&[][..], |(_, frames)| frames);
        let possible = restored.map_or_else(|| disk.possible(sector), |value| vec![value]);
        for value in possible {
            if disk.is_rotten(sector) {
                // Nobody can know.
                continue;
            }
            let is_lost = || self.instead.get(&sector).is_some_and(|values| values.contains(&value));
            let is_next = || {
                next.iter().any(|(range, data)| sectors(*range).contains(&sector) && data.at(sector) == value)
            };
            assert!(
                value == durable || is_next() || is_lost(),
                "W3: sector {sector} of replica {host} may be {value}; it was {durable} in the last durable epoch"
            );
        }
    }
}

/// What the model knows of one replica. What a replica's disk must hold, as the model knows it.
#[derive(Clone, Debug)]
pub struct Mirror {
    /// What the superblock says durably, as far as the agent knows.
    pub data: DataState,
    /// What the disk may hold, while the data are consistent.
    pub image: Option<Image>,
    /// What it can be rolled back to, in a gap.
    pub point: Option<RollbackPoint>,
    /// A commit that was sent and is not known to be durable.
    pending: Option<(Position, Image)>,
    /// The connection of the last session.
    connection: u64,
    /// The frames of that session from the last commit on.
    sent: Frames,
    last_durable: EpochKey,
    last_sent: Option<Sequence>,
    skips_are_announced: bool,
}

impl Default for Mirror {
    fn default() -> Self {
        Self {
            data: DataState::Empty,
            image: None,
            point: None,
            pending: None,
            connection: 0,
            sent: Frames::new(),
            last_durable: (0, 0),
            last_sent: None,
            skips_are_announced: true,
        }
    }
}

impl Mirror {
    /// What the disk of a primary that becomes a replica may hold.
    #[must_use]
    pub fn of_primary(disk: &Disk, promises: &Promises) -> Self {
        let image = Image {
            base: disk.content().clone(),
            instead: promises.values(),
            frames: Frames::new(),
            narrowed: BTreeSet::new(),
        };
        Self { data: DataState::Consistent, image: Some(image), ..Self::default() }
    }

    /// Nothing can be had of the disk.
    #[must_use]
    pub fn of_mixture() -> Self {
        Self { data: DataState::Inconsistent, ..Self::default() }
    }

    /// What can be had of a disk that only its history leads back on.
    #[must_use]
    pub fn of_point(point: &HistoryPoint) -> Self {
        let point = RollbackPoint { layer: point.layer, image: Image::of(point.possible()) };
        Self { data: DataState::Inconsistent, point: Some(point), ..Self::default() }
    }

    /// What the disk of a host may hold that was recovered from a copy of which this is known; nothing is, unless that is an
    /// image.
    #[must_use]
    pub fn of_recovered(self, is_image: bool) -> Self {
        match self.image.filter(|_| is_image) {
            Some(image) => Self { data: DataState::Consistent, image: Some(image), ..Self::default() },
            None => Self::default(),
        }
    }

    /// Something else wrote to a sector of the disk, where nothing is being written. In a gap, that is what it holds after a
    /// rollback, too, unless its pre-image was saved before.
    pub fn something_else_wrote(&mut self, sector: u64, value: Value, is_saved: bool) {
        if let Some(image) = &mut self.image {
            image.something_else_wrote(sector, value);
        }
        if let Some(point) = self.point.as_mut().filter(|_| !is_saved) {
            point.image.something_else_wrote(sector, value);
        }
    }

    /// The replica answers the greeting of a new session.
    pub fn session_begins(&mut self, connection: u64) {
        self.connection = connection;
        self.sent.clear();
        self.last_sent = None;
        self.skips_are_announced = false;
    }

    /// A primary announces a resync.
    pub fn resync_is_announced(&mut self, connection: u64) {
        if connection == self.connection {
            self.skips_are_announced = true;
        }
    }

    /// A primary sends a live frame.
    ///
    /// # Panics
    /// When writes were left out before it and the replica still counts as consistent (W3).
    pub fn frame_is_sent(&mut self, key: EpochKey, sequence: Sequence, range: ByteRange, data: &Data) {
        if key.0 != self.connection {
            return;
        }
        if let Some(last) = self.last_sent.filter(|_| !self.skips_are_announced) {
            assert!(
                sequence <= last.next(),
                "W3: the stream leaves out writes between {last} and {sequence}"
            );
        }
        self.last_sent = Some(sequence);
        for image in self.image.iter_mut().chain(self.pending.iter_mut().map(|(_, image)| image)) {
            image.frames.entry(key).or_default().push((range, data.clone()));
        }
        self.sent.entry(key).or_default().push((range, data.clone()));
    }

    /// A primary sends a commit.
    pub fn commit_is_sent(&mut self, connection: u64, position: Position, image: Image) {
        if connection != self.connection {
            return;
        }
        self.sent = self.sent.split_off(&(connection, position.epoch.0 + 1));
        let mut image = Image { frames: self.sent.clone(), ..image };
        image.durable(self.last_durable);
        self.pending = Some((position, image));
        self.last_sent = None;
        self.skips_are_announced = false;
    }

    /// The replica acknowledges epochs of its session up to this one as durable.
    pub fn acknowledged(&mut self, epoch: Epoch) {
        if epoch == Epoch(0) {
            // None of its session: it only tells its marker.
            return;
        }
        self.last_durable = (self.connection, epoch.0);
        let images = self.image.iter_mut().chain(self.pending.iter_mut().map(|(_, image)| image));
        images.for_each(|image| image.durable(self.last_durable));
    }

    /// The superblock says this durably.
    pub fn state_is_durable(&mut self, change: &StateChange) {
        match change {
            StateChange::Begin { rollback, .. } => {
                self.data = DataState::Inconsistent;
                self.begin_gap(*rollback);
            }
            StateChange::GiveRollbackUp => self.point = None,
            StateChange::Commit { position, .. } => {
                self.data = DataState::Consistent;
                self.commit_is_durable(Some(*position));
            }
            StateChange::Follow { .. }
            | StateChange::Keep(_)
            | StateChange::Behind
            | StateChange::Generation(_)
            | StateChange::Forget
            | StateChange::Release => {}
        }
    }

    /// From now on the image can only be had by rolling back, if there is a layer for it.
    fn begin_gap(&mut self, rollback: Option<LayerId>) {
        if let Some(image) = self.image.take()
            && let Some(layer) = rollback
        {
            self.point = Some(RollbackPoint { layer, image });
        }
    }

    /// The host starts, and this is what its superblock says. Whether that is a commit which nobody has seen to be durable.
    ///
    /// # Panics
    /// When nobody recorded that.
    pub fn recovered(&mut self, data: DataState, position: Position, rollback: Option<LayerId>) -> bool {
        let had_commit = self.pending.is_some();
        self.data = data;
        match data {
            DataState::Consistent => self.commit_is_durable(Some(position)),
            DataState::Inconsistent => self.begin_gap(rollback),
            DataState::Empty => self.image = None,
        }
        if rollback.is_none() {
            self.point = None;
        }
        assert_eq!(self.point.as_ref().map(|point| point.layer), rollback, "the gap is what was recorded");
        let is_consistent = data == DataState::Consistent;
        assert_eq!(self.image.is_some(), is_consistent, "the data state is what was recorded");
        had_commit && is_consistent && self.pending.is_none()
    }

    fn commit_is_durable(&mut self, position: Option<Position>) {
        if let Some((_, image)) = self.pending.take_if(|(pending, _)| Some(*pending) == position) {
            self.image = Some(image);
            self.point = None;
        }
    }
}
