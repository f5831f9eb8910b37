//! What a seed decides before anything happens.

use super::random::Random;
use blockmirror_protocol::disk::activity_log::CAPACITY;
use blockmirror_protocol::promise::PATIENCE;
use blockmirror_protocol::replica::SpacePolicy;
use blockmirror_protocol::terms::Mode;
use blockmirror_protocol::tracker::LEAST_ACTIVE_EXTENTS;
use blockmirror_protocol::tracker::replies::ReplicaLoss;
use blockmirror_protocol::units::BlockSize;
use std::time::Duration;

/// How a world is, before anything happens in it.
#[derive(Clone, Debug)]
pub struct Settings {
    /// The volume's size in bytes.
    pub size_bytes: u64,
    /// The tracking block.
    pub block_size: BlockSize,
    /// The primary's physical sector, then each replica's.
    pub sector_bytes: Vec<u64>,
    /// How much of live frames the hosts agree on.
    pub window_bytes: u64,
    /// How long a disk takes at most, by host.
    pub disk_delay: Vec<Duration>,
    /// How much longer a sync of the primary's backing takes at most.
    pub sync_delay: Duration,
    /// How long a packet takes at most.
    pub link_delay: Duration,
    /// One disk operation in so many fails; 0 for none.
    pub disk_failures: u64,
    /// Whether sectors of disks go bad.
    pub bad_sectors: bool,
    /// Whether operators change their mind about modes, and what happens while a host is lost.
    pub choices_change: bool,
    /// Whether hosts are removed, and taken in again.
    pub members_change: bool,
    /// Whether state folders fail for a while.
    pub state_failures: bool,
    /// One mishap in so many is a disk or a state folder that hangs; 0 for none.
    pub hangs: u64,
    /// How many starts of a host there are for one before which a page of its metadata rots; none where 0. Where there are any,
    /// sectors of copies rot in the end.
    pub rots: u64,
    /// Whether primaries whose disks are lost serve at once, and are filled from a replica meanwhile.
    pub rebuilds: bool,
    /// One mishap in so many is a disk that is lost, whose content is recovered from another host; 0 for none.
    pub disk_losses: u64,
    /// One save of pre-images in so many finds no room; 0 for none.
    pub space_failures: u64,
    /// What replicas do then.
    pub space: SpacePolicy,
    /// When requests are answered, by the host that counts.
    pub modes: Vec<Mode>,
    /// What happens while a host that counts is lost.
    pub loss: ReplicaLoss,
    /// For how long a primary keeps its word to a replica that it doesn't hear.
    pub patience: Duration,
    /// Whether operators change roles.
    pub has_operators: bool,
    /// One mishap in so many, where operators change roles, is a primary that is demoted and returns alone; 0 for none.
    pub returns: u64,
    /// One mishap in so many, where they don't, is a host that is set back or remembered for that.
    pub set_backs: u64,
    /// How many starts of a replica there are for one before which something else wrote to its disk; none where 0.
    pub touches: u64,
    /// One mishap in so many is a host that is suspended while it and another one don't reach each other; 0 for none. Where there
    /// are any, clocks stand still in each sleep, and none runs like another.
    pub sleeps: u64,
    /// Whether most connections are lost between the recording of their session's number and the greeting.
    pub loses_greetings: bool,
    /// How many requests an application has under way.
    pub concurrency: usize,
    /// How long the application waits between requests at most.
    pub think_time: Duration,
    /// The longest write, in bytes.
    pub write_bytes: u64,
    /// Places that most requests go to, in bytes.
    pub hot_spots: Vec<u64>,
    /// One request in so many goes anywhere instead.
    pub cold_requests: u64,
    /// One request in so many is zeroes, a flush, durable.
    pub zeroes: u64,
    /// See `zeroes`.
    pub flushes: u64,
    /// See `zeroes`.
    pub durable_writes: u64,
    /// How long a host is down, a lost connection unnoticed and a primary without another try, at most.
    pub outage: Duration,
    /// How long mishaps and requests go on.
    pub duration: Duration,
    /// How long until the next mishap at most; none for no mishaps at all.
    pub mishaps: Option<Duration>,
    /// How many extents a primary has active at once.
    pub active_extents: usize,
}

/// How many generations a lineage holds: what so many hosts need, and hardly more.
#[must_use]
pub fn lineage_limit(hosts: usize) -> usize {
    5 * hosts
}

impl Settings {
    /// What this seed decides.
    #[must_use]
    pub fn random(random: &mut Random, seconds: u64) -> Self {
        match random.below(72) {
            0 => Self::wide(random, seconds),
            1..=4 => Self::narrow(random, seconds),
            5..=16 => Self::calm(random, seconds),
            17..=20 => Self::guarded(random, seconds),
            21..=24 | 29..=32 => Self::rotten(random, seconds),
            33..=38 => Self::hanging(random, seconds),
            39..=40 => Self::dozing(random, seconds),
            41..=42 => Self::handled(random, seconds),
            43..=51 => Self::forgetful(random, seconds),
            52..=57 => Self::rewound(random, seconds),
            58..=60 => Self::peopled(random, seconds),
            61..=63 => Self::paired(random, seconds),
            64..=67 => Self::recovered(random, seconds),
            68..=71 => Self::rebuilt(random, seconds),
            _ => Self::small(random, seconds),
        }
    }

    /// Fast hosts, one replica, nothing by chance: for scripted stories.
    #[must_use]
    pub fn scripted() -> Self {
        Self {
            size_bytes: 64 << 20,
            block_size: BlockSize::default(),
            sector_bytes: vec![512, 512],
            window_bytes: 1 << 20,
            disk_delay: vec![Duration::from_millis(2); 2],
            sync_delay: Duration::ZERO,
            link_delay: Duration::from_millis(2),
            disk_failures: 0,
            bad_sectors: false,
            choices_change: false,
            members_change: false,
            state_failures: false,
            hangs: 0,
            rots: 0,
            disk_losses: 0,
            rebuilds: false,
            space_failures: 0,
            space: SpacePolicy::Pause,
            modes: vec![Mode::Async; 4],
            loss: ReplicaLoss::Continue,
            patience: PATIENCE,
            has_operators: false,
            returns: 0,
            set_backs: 0,
            touches: 0,
            sleeps: 0,
            loses_greetings: false,
            concurrency: 16,
            think_time: Duration::from_millis(4),
            write_bytes: 8192,
            hot_spots: vec![0],
            cold_requests: 0,
            zeroes: 0,
            flushes: 0,
            durable_writes: 0,
            outage: Duration::from_secs(1),
            duration: Duration::ZERO,
            mishaps: None,
            active_extents: CAPACITY,
        }
    }

    /// More extents than the activity log holds, all in use.
    fn wide(random: &mut Random, seconds: u64) -> Self {
        Self {
            size_bytes: 9 << 29,
            block_size: BlockSize::new(65536).expect("it is a block size"),
            window_bytes: 16 << 20,
            disk_delay: vec![Duration::from_millis(20); 4],
            sync_delay: Duration::from_secs(2),
            disk_failures: 0,
            concurrency: 32,
            think_time: Duration::from_millis(4),
            write_bytes: 2048,
            cold_requests: 1,
            zeroes: 50,
            flushes: 2000,
            durable_writes: 0,
            mishaps: Some(Duration::from_secs(3)),
            ..Self::narrow(random, seconds)
        }
    }

    /// A few extents and hot blocks, few requests, and something goes wrong all the time: many kinds of world begin like this,
    /// since what breaks a rule is seldom long.
    fn small(random: &mut Random, seconds: u64) -> Self {
        let size_bytes = match random.below(3) {
            0 => (256 << 10) + 512 * random.below(3584),
            1 => (4 << 20) + 512 * random.below(8192),
            _ => (12 << 20) + 4096 * random.below(4096),
        };
        let milliseconds = [2, 10, 50].map(Duration::from_millis);
        Self {
            size_bytes,
            block_size: BlockSize::new(random.pick(&[4096, 4096, 65536])).expect("it is a block size"),
            window_bytes: random.pick(&[16 << 10, 64 << 10, 1 << 20]),
            disk_failures: random.pick(&[0, 0, 50, 300]),
            concurrency: 1 + random.below(8) as usize,
            think_time: random.pick(&milliseconds) * 3,
            write_bytes: random.pick(&[2048, 8192, 32 << 10]),
            hot_spots: (0..1 + random.below(4)).map(|_| random.below(size_bytes / 512) * 512).collect(),
            cold_requests: random.pick(&[0, 8, 50]),
            zeroes: random.pick(&[0, 8, 40]),
            flushes: random.pick(&[3, 10, 200]),
            mishaps: random.pick(&[Some(100), Some(300), Some(1000), None]).map(Duration::from_millis),
            outage: random.pick(&[
                Duration::from_millis(50),
                Duration::from_millis(300),
                Duration::from_secs(1),
            ]),
            ..Self::narrow(random, seconds)
        }
    }

    /// Few writes to many extents over a long time: extents that lie idle leave the activity log, and only the maps
    /// remember what was written there. Operators change roles often.
    fn calm(random: &mut Random, seconds: u64) -> Self {
        let size_bytes = 48 << 20;
        Self {
            size_bytes,
            block_size: BlockSize::default(),
            disk_failures: 0,
            has_operators: true,
            concurrency: 2,
            think_time: Duration::from_millis(random.pick(&[200, 1000])),
            write_bytes: 8192,
            hot_spots: (0..8).map(|_| random.below(size_bytes / 512) * 512).collect(),
            cold_requests: random.pick(&[0, 4]),
            zeroes: 0,
            flushes: 5,
            sync_delay: Duration::ZERO,
            disk_delay: vec![Duration::from_millis(random.pick(&[2, 30])); 4],
            link_delay: Duration::from_millis(2),
            outage: Duration::from_millis(random.pick(&[100, 10_000])),
            duration: Duration::from_secs(seconds * 10),
            mishaps: Some(Duration::from_secs(random.pick(&[1, 4]))),
            ..Self::narrow(random, seconds)
        }
    }

    /// Metadata that rots while hosts are down, on hosts whose marks are only in their maps when they start, since they rest for long;
    /// and copies that rot in the end.
    fn rotten(random: &mut Random, seconds: u64) -> Self {
        Self {
            sector_bytes: vec![512; 2 + random.below(2) as usize],
            bad_sectors: false,
            disk_losses: 0,
            members_change: false,
            state_failures: random.once_in(2),
            rots: random.pick(&[2, 4]),
            set_backs: 0,
            has_operators: random.once_in(2),
            outage: Duration::from_millis(random.pick(&[300, 10_000])),
            ..Self::calm(random, seconds)
        }
    }

    /// Disks and state folders that hang for longer than deadlines, on hosts that otherwise seldom fail. The world's time is long
    /// enough for the deadlines to pass.
    fn hanging(random: &mut Random, seconds: u64) -> Self {
        let hosts = 2 + random.below(2) as usize;
        Self {
            sector_bytes: vec![512; hosts],
            disk_delay: vec![Duration::from_millis(random.pick(&[2, 10])); 4],
            sync_delay: Duration::ZERO,
            link_delay: Duration::from_millis(2),
            disk_failures: 0,
            bad_sectors: false,
            choices_change: false,
            members_change: false,
            state_failures: false,
            disk_losses: 0,
            hangs: 2,
            modes: vec![random.pick(&[Mode::Async, Mode::SemiSync, Mode::Sync, Mode::Sync]); 4],
            loss: random.pick(&[
                ReplicaLoss::Continue,
                ReplicaLoss::Continue,
                ReplicaLoss::Block { min_replicas: 1, limit: Duration::from_secs(2) },
            ]),
            patience: Duration::from_millis(random.pick(&[200, 1000])),
            has_operators: random.once_in(3),
            flushes: 3,
            think_time: Duration::from_millis(random.pick(&[50, 400])),
            outage: Duration::from_millis(random.pick(&[50, 300])),
            duration: Duration::from_secs(seconds * 10),
            mishaps: Some(Duration::from_secs(random.pick(&[2, 8, 20, 20]))),
            ..Self::small(random, seconds)
        }
    }

    /// Disks of primaries and replicas are lost again and again, of what has left the activity log as well: three hosts at least, for
    /// what one that was recovered knows of a third.
    fn recovered(random: &mut Random, seconds: u64) -> Self {
        let base = if random.once_in(2) { Self::calm(random, seconds) } else { Self::small(random, seconds) };
        let hosts = 3 + random.below(2) as usize;
        Self {
            sector_bytes: vec![512; hosts],
            disk_delay: vec![Duration::from_millis(random.pick(&[2, 30])); 4],
            sync_delay: Duration::ZERO,
            link_delay: Duration::from_millis(2),
            disk_failures: 0,
            bad_sectors: false,
            choices_change: false,
            members_change: false,
            state_failures: false,
            disk_losses: random.pick(&[2, 3]),
            set_backs: 0,
            loss: ReplicaLoss::Continue,
            has_operators: true,
            ..base
        }
    }

    /// Disks of primaries are lost again and again, and are filled from a replica while applications write to them.
    fn rebuilt(random: &mut Random, seconds: u64) -> Self {
        let base = if random.once_in(3) { Self::calm(random, seconds) } else { Self::small(random, seconds) };
        let hosts = 2 + random.below(2) as usize;
        // Few sectors: each of them is looked at again and again; or so many that the source is in sync long before the end.
        let is_long = random.once_in(3);
        let size_bytes = if is_long { 6 << 20 } else { 256 << 10 } + 512 * random.below(4096);
        Self {
            size_bytes,
            hot_spots: (0..1 + random.below(4)).map(|_| random.below(size_bytes / 512) * 512).collect(),
            sector_bytes: (0..hosts).map(|_| random.pick(&[512, 512, 4096])).collect(),
            disk_delay: vec![Duration::from_millis(random.pick(&[2, 10, 30])); 4],
            sync_delay: Duration::ZERO,
            link_delay: Duration::from_millis(random.pick(&[2, 20])),
            disk_failures: random.pick(&[0, 60, 200, 2000]),
            bad_sectors: false,
            choices_change: false,
            members_change: false,
            state_failures: random.once_in(4),
            rebuilds: true,
            disk_losses: random.pick(&[3, 8]),
            set_backs: 0,
            has_operators: false,
            outage: Duration::from_millis(random.pick(&[50, 300])),
            ..base
        }
    }

    /// Nothing is answered without another host, and hosts and disks are lost: what a promotion may count on others for.
    fn guarded(random: &mut Random, seconds: u64) -> Self {
        let choices_change = random.once_in(2);
        // A third host would tell that there is more.
        let hosts = if choices_change { 2 } else { 3 } + random.below(2);
        Self {
            sector_bytes: (0..hosts).map(|_| random.pick(&[512, 4096])).collect(),
            disk_delay: vec![Duration::from_millis(random.pick(&[2, 10])); 4],
            sync_delay: Duration::ZERO,
            link_delay: Duration::from_millis(2),
            disk_failures: 0,
            bad_sectors: false,
            disk_losses: 8,
            modes: vec![Mode::Sync; 4],
            loss: ReplicaLoss::Block { min_replicas: 1, limit: Duration::from_millis(100) },
            has_operators: true,
            returns: 0,
            choices_change,
            flushes: 3,
            outage: Duration::from_millis(300),
            mishaps: Some(Duration::from_millis(300)),
            ..Self::small(random, seconds)
        }
    }

    /// Many hosts that are removed and promoted: what one says of another may be of before.
    fn peopled(random: &mut Random, seconds: u64) -> Self {
        Self {
            sector_bytes: vec![512; 4],
            disk_delay: vec![Duration::from_millis(2); 4],
            sync_delay: Duration::ZERO,
            link_delay: Duration::from_millis(random.pick(&[2, 20])),
            disk_failures: 0,
            bad_sectors: false,
            state_failures: false,
            disk_losses: 0,
            members_change: true,
            has_operators: true,
            outage: Duration::from_millis(300),
            mishaps: Some(Duration::from_millis(100)),
            ..Self::small(random, seconds)
        }
    }

    /// Machines that are suspended, and replicas that count on their primary's word while they don't reach it.
    fn dozing(random: &mut Random, seconds: u64) -> Self {
        Self {
            sector_bytes: vec![512; 2],
            disk_delay: vec![Duration::from_millis(2); 4],
            sync_delay: Duration::ZERO,
            link_delay: Duration::from_millis(2),
            disk_failures: 0,
            bad_sectors: false,
            choices_change: false,
            members_change: false,
            state_failures: false,
            disk_losses: 0,
            modes: vec![Mode::Sync; 4],
            loss: ReplicaLoss::Continue,
            patience: Duration::from_millis(random.pick(&[200, 1000])),
            has_operators: true,
            sleeps: 3,
            flushes: 3,
            think_time: Duration::from_millis(20),
            outage: Duration::from_millis(50),
            mishaps: Some(Duration::from_millis(500)),
            ..Self::small(random, seconds)
        }
    }

    /// Operators change roles again and again, and something else writes to disks meanwhile: what is promoted, undone, given up
    /// and recovered may be what nobody wrote.
    fn handled(random: &mut Random, seconds: u64) -> Self {
        let hosts = 2 + random.below(2) as usize;
        Self {
            sector_bytes: vec![512; hosts],
            disk_delay: vec![Duration::from_millis(random.pick(&[2, 10])); 4],
            sync_delay: Duration::ZERO,
            link_delay: Duration::from_millis(2),
            disk_failures: 0,
            bad_sectors: false,
            state_failures: false,
            has_operators: true,
            touches: random.pick(&[2, 6]),
            modes: vec![random.pick(&[Mode::Async, Mode::Sync, Mode::Sync]); 4],
            flushes: 3,
            outage: Duration::from_millis(random.pick(&[50, 300])),
            mishaps: Some(Duration::from_millis(100)),
            ..Self::small(random, seconds)
        }
    }

    /// The same where nothing goes wrong but that hosts are set back often, which nobody can do beside operators: what was promised
    /// to a promoted copy, nobody would know.
    fn with_set_backs(self) -> Self {
        Self {
            bad_sectors: false,
            choices_change: false,
            members_change: false,
            state_failures: false,
            disk_losses: 0,
            loss: ReplicaLoss::Continue,
            has_operators: false,
            set_backs: 2,
            ..self
        }
    }

    /// Hosts that are set back again and again, also in the middle of resyncs.
    fn rewound(random: &mut Random, seconds: u64) -> Self {
        let hosts = 2 + random.below(2) as usize;
        Self {
            sector_bytes: vec![512; hosts],
            disk_delay: vec![Duration::from_millis(random.pick(&[2, 10])); 4],
            sync_delay: Duration::ZERO,
            link_delay: Duration::from_millis(2),
            disk_failures: 0,
            touches: random.pick(&[0, 4]),
            loses_greetings: random.once_in(4),
            outage: Duration::from_millis(random.pick(&[50, 300])),
            mishaps: Some(Duration::from_millis(100)),
            ..Self::small(random, seconds).with_set_backs()
        }
    }

    /// Hosts that are set back in the middle of long resyncs, of what has left the activity log, and primaries that use the
    /// numbers of sessions up since.
    fn forgetful(random: &mut Random, seconds: u64) -> Self {
        let seconds = random.pick(&[seconds, seconds.div_ceil(3)]);
        let it = Self {
            sector_bytes: vec![512; 2],
            disk_delay: vec![Duration::from_millis(random.pick(&[30, 200])); 4],
            loses_greetings: true,
            cold_requests: 2,
            think_time: Duration::from_millis(random.pick(&[50, 200])),
            outage: Duration::from_millis(random.pick(&[50, 300])),
            mishaps: Some(Duration::from_millis(random.pick(&[300, 1000]))),
            ..Self::calm(random, seconds).with_set_backs()
        };
        Self { set_backs: random.pick(&[1, 1, 2]), ..it }
    }

    /// Two hosts whose operators change roles and go separate ways: each may be a primary that the other one knows nothing of.
    fn paired(random: &mut Random, seconds: u64) -> Self {
        Self {
            sector_bytes: vec![512; 2],
            loss: ReplicaLoss::Continue,
            flushes: 3,
            returns: 4,
            ..Self::peopled(random, seconds)
        }
    }

    fn narrow(random: &mut Random, seconds: u64) -> Self {
        let size_bytes = match random.below(16) {
            0..=3 => (256 << 10) + 512 * random.below(3584),
            4..=9 => (8 << 20) + 4096 * random.below(4096),
            _ => (64 << 20) + 512 * random.below(131_072),
        };
        let hosts = 2 + random.below(3) as usize;
        let milliseconds = [1, 5, 20, 100].map(Duration::from_millis);
        let hot_spots = (0..1 + random.below(12)).map(|_| random.below(size_bytes / 512) * 512).collect();
        Self {
            size_bytes,
            block_size: BlockSize::new(if size_bytes < 1 << 30 {
                random.pick(&[4096, 65536])
            } else {
                65536
            })
            .expect("both are block sizes"),
            sector_bytes: (0..hosts).map(|_| random.pick(&[512, 4096])).collect(),
            window_bytes: random.pick(&[64 << 10, 256 << 10, 1 << 20, 16 << 20]),
            disk_delay: (0..hosts).map(|_| random.pick(&milliseconds)).collect(),
            sync_delay: Duration::from_millis(random.pick(&[0, 0, 1000])),
            link_delay: random.pick(&milliseconds),
            disk_failures: random.pick(&[0, 0, 100, 500]),
            bad_sectors: random.once_in(3),
            choices_change: random.once_in(4),
            members_change: random.once_in(4),
            state_failures: random.once_in(4),
            hangs: 0,
            rots: 0,
            disk_losses: random.pick(&[0, 0, 8]),
            rebuilds: false,
            space_failures: random.pick(&[0, 0, 20]),
            space: random.pick(&[SpacePolicy::Pause, SpacePolicy::GoOn]),
            modes: (0..4).map(|_| random.pick(&[Mode::Async, Mode::SemiSync, Mode::Sync])).collect(),
            loss: match random.below(4) {
                0 => ReplicaLoss::Block {
                    min_replicas: 1 + random.below(2) as usize,
                    limit: random.pick(&milliseconds) * 100,
                },
                _ => ReplicaLoss::Continue,
            },
            patience: random.pick(&[Duration::from_millis(200), Duration::from_secs(1), PATIENCE]),
            has_operators: random.once_in(2),
            returns: 20,
            set_backs: 5,
            touches: 0,
            sleeps: 0,
            loses_greetings: false,
            concurrency: 1 + random.below(16) as usize,
            think_time: random.pick(&[
                Duration::from_millis(4),
                Duration::from_millis(40),
                Duration::from_millis(400),
            ]),
            write_bytes: random.pick(&[2048, 8192, 100 << 10]),
            hot_spots,
            cold_requests: random.pick(&[2, 8, 50]),
            zeroes: random.pick(&[0, 8, 40]),
            flushes: random.pick(&[3, 10, 200]),
            durable_writes: random.pick(&[4, 30, 0]),
            outage: Duration::from_secs(1),
            duration: Duration::from_secs(seconds),
            mishaps: random.pick(&[Some(500), Some(3000), Some(3000), None]).map(Duration::from_millis),
            active_extents: random.pick(&[LEAST_ACTIVE_EXTENTS, CAPACITY]),
        }
    }
}
