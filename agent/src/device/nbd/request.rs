//! What is to become of a request: judged by its header alone, before any payload is read.

use super::negotiate::Agreed;
use crate::device::{Command, Geometry};
use blockmirror_protocol::nbd::transmission::{CommandFlags, CommandKind, Failure, RequestHeader};
use blockmirror_protocol::ranges::ByteRange;
use blockmirror_protocol::units::SECTOR_BYTES;

/// Offsets and lengths are multiples of this many bytes.
pub(super) const REQUEST_UNIT_BYTES: u32 = SECTOR_BYTES as u32;

/// The longest payload of a write, and the longest read, in bytes. Requests without a payload may be longer.
pub(super) const PAYLOAD_LIMIT_BYTES: u32 = 64 << 20;

/// What is to become of a request.
#[derive(Debug)]
pub(super) enum Judged {
    /// The volume takes it as it is.
    Submit(Command),
    /// The volume takes it as a write of these bytes, once they are here.
    Receive { range: ByteRange, fua: bool },
    /// There is nothing to do, and it succeeds.
    Nothing,
    /// The client leaves.
    Disconnect,
    /// It fails. A write's payload has still to be read.
    Refuse(Failure),
}

/// Judges a request.
pub(super) fn judge(request: &RequestHeader, geometry: &Geometry, agreed: Agreed) -> Judged {
    let range = match request.kind {
        CommandKind::Disconnect => return Judged::Disconnect,
        CommandKind::Flush if has_only(request, CommandFlags::FUA) => return Judged::Submit(Command::Flush),
        _ => match check(request, geometry, agreed) {
            Ok(range) => range,
            Err(failure) => return Judged::Refuse(failure),
        },
    };
    let fua = request.flags.contains(CommandFlags::FUA);
    let no_hole = request.flags.contains(CommandFlags::NO_HOLE);
    match request.kind {
        CommandKind::Read => Judged::Submit(Command::Read(range)),
        CommandKind::Write => Judged::Receive { range, fua },
        CommandKind::Trim => Judged::Submit(Command::Zero { range, may_unmap: true, fua }),
        CommandKind::WriteZeroes => Judged::Submit(Command::Zero { range, may_unmap: !no_hole, fua }),
        CommandKind::BlockStatus => Judged::Submit(Command::Allocation(range)),
        CommandKind::Cache => Judged::Nothing,
        CommandKind::Disconnect | CommandKind::Flush | CommandKind::Unknown(_) => {
            unreachable!("a request without a range passed the check of ranges")
        }
    }
}

fn has_only(request: &RequestHeader, allowed: CommandFlags) -> bool {
    allowed.contains(request.flags)
}

/// The range of a request that has one, if all is well with it.
fn check(request: &RequestHeader, geometry: &Geometry, agreed: Agreed) -> Result<ByteRange, Failure> {
    let allowed = allowed_flags(request.kind, agreed).ok_or(Failure::Invalid)?;
    if !has_only(request, allowed) {
        return Err(Failure::Invalid);
    }
    let writes = matches!(request.kind, CommandKind::Write | CommandKind::Trim | CommandKind::WriteZeroes);
    if writes && geometry.read_only {
        return Err(Failure::NotPermitted);
    }
    let moves_data = matches!(request.kind, CommandKind::Read | CommandKind::Write);
    let too_long = moves_data && request.length > PAYLOAD_LIMIT_BYTES;
    let unit = SECTOR_BYTES;
    let aligned = request.offset.is_multiple_of(unit) && u64::from(request.length).is_multiple_of(unit);
    // The protocol leaves it open what a request for no bytes means.
    if too_long || !aligned || request.length == 0 {
        return Err(Failure::Invalid);
    }
    let end = request.offset.checked_add(u64::from(request.length));
    if end.is_none_or(|end| end > geometry.size_bytes) {
        let out_of_space = matches!(request.kind, CommandKind::Write | CommandKind::WriteZeroes);
        return Err(if out_of_space { Failure::NoSpace } else { Failure::Invalid });
    }
    Ok(ByteRange::new(request.offset, u64::from(request.length)))
}

/// The flags that a kind of request may have, or `None` where the kind itself was not offered. FUA is allowed on
/// everything and means something only where something is written.
fn allowed_flags(kind: CommandKind, agreed: Agreed) -> Option<CommandFlags> {
    match kind {
        CommandKind::Read if agreed.structured => Some(CommandFlags::FUA.with(CommandFlags::DONT_FRAGMENT)),
        CommandKind::Read | CommandKind::Write | CommandKind::Trim | CommandKind::Cache => {
            Some(CommandFlags::FUA)
        }
        CommandKind::WriteZeroes => Some(CommandFlags::FUA.with(CommandFlags::NO_HOLE)),
        CommandKind::BlockStatus if agreed.allocation => {
            Some(CommandFlags::FUA.with(CommandFlags::ONE_DESCRIPTOR))
        }
        CommandKind::BlockStatus | CommandKind::Flush | CommandKind::Disconnect | CommandKind::Unknown(_) => {
            None
        }
    }
}
