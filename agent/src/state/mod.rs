//! The state folder of a volume: all that a host remembers of it, but for its content and its configuration.
//!
//! | file | what it holds | who may write it |
//! |---|---|---|
//! | `superblock`, `activity-log`, `marker`, `map-*`, `absent` | who this copy is, what may differ, how far it is, what of it is not here | the volume's thread, by [`metadata`] |
//! | `pre-images-*` | what was overwritten that may be wanted back | the volume's thread, by [`pre_images`] |
//! | `held` | whether the backing is open, and how it looked when it was closed | the volume's thread, by [`holding`] |
//! | `backing` | which disk or image the volume has | whoever opens it, and a recovery into another one, by [`backing`] |
//! | `generations` | when each generation began, for words alone | the primary, by [`generations`] |
//! | `invitations.toml` | who may join | the supervisor, by [`invitations`] |
//! | `panics`, `heard` | panics for which the volume stays closed; when a primary last heard of another host | `crashes`; `volume/company` |
//!
//! Whoever opens a volume gets an [`Unrecovered`] state, and a role is opened with a [`Recovered`] one alone.
//!
//! [`stored`] reads the first two rows and changes nothing, also while their owner writes. Nothing in here knows a role's machine
//! or a connection.

mod absent;
pub mod backing;
pub mod generations;
pub mod holding;
pub mod invitations;
pub mod metadata;
pub mod pre_images;
mod recovered;
pub mod stored;

pub use metadata::{State, StateError};
pub use recovered::{Recovered, Unrecovered};
