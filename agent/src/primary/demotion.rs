//! How a primary ends: superseded by another host, or demoted by its operator (L5).
//!
//! That it is a replica from now on is durable before any replica is told that it may take over, so a crash in between
//! leaves no primary rather than two. The devices have been stopped by then, or fail every write.

use super::Primary;
use crate::state::StateError;
use blockmirror_protocol::handover::End;
use blockmirror_protocol::peer::{Connection, ReplicaState};
use blockmirror_protocol::terms::Fence;
use blockmirror_protocol::units::{GenerationId, HostId};
use std::time::Duration;

impl Primary {
    /// Another host was promoted with this fence: no write is taken any more (L5).
    pub fn supersede(&self, fence: Fence) {
        self.superseded.set(Some(fence));
        self.drive(|inner, now| inner.tracker.supersede(now));
        self.settled.notify_waiters();
    }

    /// The fence of the host that was promoted since, if there is one.
    #[must_use]
    pub fn superseded(&self) -> Option<Fence> {
        self.superseded.get()
    }

    /// Records durably that this host is a replica from now on: of the host that was promoted since, or of whoever is next.
    ///
    /// # Errors
    /// [`StateError`] when it can't be written; then it is the primary still, or what its superblock says.
    pub async fn record_demotion(&self) -> Result<(), StateError> {
        let ours = self.state.superblock().fence;
        let end = {
            let tracker = &self.inner.borrow().tracker;
            match self.superseded.get() {
                Some(fence) => End::superseded(tracker, ours, fence),
                None => End::in_order(tracker, ours),
            }
        };
        let own = end.needs_generation().then(|| GenerationId(crate::transport::key::random()));
        self.state.change_superblock(|superblock| end.record(superblock, own)).await?;
        own.into_iter().for_each(|generation| self.state.note_generation(generation));
        Ok(())
    }

    /// Tells the replicas that are in sync that they have everything, and waits until they have recorded it, so long at
    /// most. Gives those that have. [`Primary::close`] was called before.
    pub async fn release(&self, limit: Duration) -> Vec<HostId> {
        let all_recorded = async {
            loop {
                let heard = self.heard.notified();
                self.drive(|inner, now| inner.tracker.release(now));
                let released = self.released();
                if self.in_sync().iter().all(|peer| released.contains(peer)) {
                    break;
                }
                heard.await;
            }
        };
        // Who has not recorded it by then is told apart by the operator.
        let _ = tokio::time::timeout(limit, all_recorded).await;
        self.released()
    }

    fn released(&self) -> Vec<HostId> {
        let inner = self.inner.borrow();
        inner.maps.keys().copied().filter(|peer| inner.tracker.is_released(*peer)).collect()
    }

    /// The replicas that are in sync.
    #[must_use]
    pub fn in_sync(&self) -> Vec<HostId> {
        let (_, reports) = self.reports();
        let is_in_sync = |report: &blockmirror_protocol::peer::Report| {
            report.connection == Connection::Connected && report.state == ReplicaState::InSync
        };
        reports.into_iter().filter(|(_, report)| is_in_sync(report)).map(|(peer, _)| peer).collect()
    }

    /// Lets go of everything: the volume is going to be opened anew. Nothing is asked of it any more.
    pub fn retire(&self) {
        self.retired.set(true);
        self.earlier.notify_one();
        self.settled.notify_waiters();
    }

    /// Waits until the volume is opened anew.
    pub async fn is_retired(&self) {
        while !self.retired.get() {
            self.settled.notified().await;
        }
    }
}
