//! The table without a kernel: what arrives is copied into the inbox, and a successor is a second mapping of the memory.

use super::layout::{Header, PLACE_AT, SEQUENCE_AT, SESSION_AT, SLOT_BYTES, SLOTS_AT, STAGE_AT, TABLE_BYTES};
use super::*;
use crate::device::loopback::kernel::Offer;
use rustix::fs::{MemfdFlags, ftruncate, memfd_create};
use rustix::io::{pread, pwrite};
use std::os::fd::AsFd;
use zerocopy::IntoBytes;

const MIB: usize = 1 << 20;
const IDENTITY: Identity = Identity { volume: [7; 16], size_bytes: 64 << 20, read_only: false };

fn table() -> Table {
    Table::new(IDENTITY).expect("memory")
}

fn pool() -> BufferPool {
    BufferPool::new(4 << 20)
}

/// A request as the kernel writes it.
fn request(unique: u64, opcode: u32, offset: u64, length: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.extend((80 + payload.len() as u32).to_ne_bytes());
    bytes.extend(opcode.to_ne_bytes());
    bytes.extend(unique.to_ne_bytes());
    bytes.extend([0; 24]);
    bytes.extend(0u64.to_ne_bytes());
    bytes.extend(offset.to_ne_bytes());
    bytes.extend(length.to_ne_bytes());
    bytes.extend([0; 20]);
    bytes.extend(payload);
    bytes
}

/// What the kernel does when the inbox is read into.
fn put(table: &mut Table, bytes: &[u8]) {
    let [mut head, mut rest] = table.inbox().expect("there is room");
    let (first, payload) = bytes.split_at(bytes.len().min(head.len()));
    head[..first.len()].copy_from_slice(first);
    rest[..payload.len()].copy_from_slice(payload);
}

fn write(table: &mut Table, unique: u64, offset: u64, payload: &[u8]) -> Slot {
    let bytes = request(unique, 16, offset, payload.len() as u32, payload);
    put(table, &bytes);
    let arrived = table.arrived(bytes.len());
    assert_eq!(arrived.call, Ok(Call::Write { offset, length: payload.len() as u32 }));
    table.note_write(arrived.slot, ByteRange::new(offset, payload.len() as u64));
    arrived.slot
}

fn answer(table: &mut Table, slot: Slot) {
    table.begin_answer(slot);
    table.end_answer(slot);
}

fn succeed(table: &Table) -> (Table, Vec<Arrived>) {
    let file = table.file().try_clone_to_owned().expect("a descriptor");
    Table::take_over(file, IDENTITY).expect("the table can be taken over")
}

fn refusal(table: &Table) -> TakeOverError {
    let file = table.file().try_clone_to_owned().expect("a descriptor");
    Table::take_over(file, IDENTITY).err().expect("a refusal")
}

/// Changes bytes of the table.
fn poke(table: &Table, at: usize, bytes: &[u8]) {
    assert_eq!(pwrite(table.file(), bytes, at as u64).expect("memory can be written"), bytes.len());
}

fn uniques(left: &[Arrived]) -> Vec<u64> {
    left.iter().map(|arrived| arrived.unique).collect()
}

#[test]
fn a_successor_finds_what_is_unanswered_in_the_old_order_with_its_payloads() {
    let (mut table, pool) = (table(), pool());
    let payloads = [vec![1; 512], vec![2; 128 << 10], vec![3; (128 << 10) + 512], vec![4; MIB]];
    let mut slots = Vec::new();
    for (number, payload) in payloads.iter().enumerate() {
        let slot = write(&mut table, number as u64 + 1, (number * MIB) as u64, payload);
        assert_eq!(table.payload(slot, payload.len(), &pool)[..], payload[..]);
        slots.push(slot);
    }
    let read = request(5, 15, 4096, 8192, &[]);
    put(&mut table, &read);
    table.arrived(read.len());
    answer(&mut table, slots[1]);

    let (mut successor, left) = succeed(&table);
    assert_eq!(uniques(&left), [1, 3, 4, 5]);
    assert_eq!(left[3].call, Ok(Call::Read { offset: 4096, length: 8192 }));
    assert!(left.iter().all(|arrived| arrived.is_awaited));
    for (arrived, payload) in left.iter().zip([&payloads[0], &payloads[2], &payloads[3]]) {
        assert_eq!(successor.payload(arrived.slot, payload.len(), &pool)[..], payload[..]);
    }
    // What comes now is newer, and takes no place that is taken.
    let slot = write(&mut successor, 6, 0, &[6; 4096]);
    assert_eq!(successor.payload(slot, 4096, &pool)[..], [6; 4096]);
    let (_, left) = succeed(&successor);
    assert_eq!(uniques(&left), [1, 3, 4, 5, 6]);
}

#[test]
fn a_request_that_was_read_and_not_looked_at_is_found_with_its_payload() {
    let mut table = table();
    put(&mut table, &request(9, 16, 8192, 4096, &[9; 4096]));
    let (mut successor, left) = succeed(&table);
    assert_eq!(uniques(&left), [9]);
    assert_eq!(left[0].call, Ok(Call::Write { offset: 8192, length: 4096 }));
    assert_eq!(successor.payload(left[0].slot, 4096, &pool())[..], [9; 4096]);
    // The block that it was read into is not read into again.
    let slot = write(&mut successor, 10, 0, &[1; MIB]);
    assert_eq!(successor.payload(slot, MIB, &pool())[..], [1; MIB]);
    assert_eq!(successor.payload(left[0].slot, 4096, &pool())[..], [9; 4096]);
}

#[test]
fn nothing_is_found_of_what_was_answered_or_never_came() {
    let mut table = table();
    let slot = write(&mut table, 1, 0, &[1; 512]);
    table.payload(slot, 512, &pool());
    answer(&mut table, slot);
    put(&mut table, &request(2, 15, 0, 512, &[]));
    table.nothing_arrived();
    assert!(table.inbox().is_some());
    assert_eq!(uniques(&succeed(&table).1), [0; 0]);
    assert_eq!(table.count(), 0);
}

#[test]
fn whoever_does_not_know_whether_an_answer_arrived_gives_it_again() {
    let mut table = table();
    let slot = write(&mut table, 1, 0, &[1; 512]);
    table.payload(slot, 512, &pool());
    table.begin_answer(slot);
    let (_, left) = succeed(&table);
    assert_eq!(uniques(&left), [1]);
    assert!(left[0].is_awaited);
}

/// Re-executing an older write without those that had overwritten it would have brought old content back.
#[test]
fn a_write_stays_until_all_older_ones_that_overlap_it_have_gone() {
    let (mut table, pool) = (table(), pool());
    let put_write = |table: &mut Table, unique, offset| {
        let slot = write(table, unique, offset, &[unique as u8; 4096]);
        table.payload(slot, 4096, &pool);
        slot
    };
    let oldest = put_write(&mut table, 1, 0);
    let newer = put_write(&mut table, 2, 2048);
    let newest = put_write(&mut table, 3, 4096);
    let elsewhere = put_write(&mut table, 4, 1 << 20);
    for slot in [elsewhere, newest, newer] {
        answer(&mut table, slot);
    }
    // The third overlaps the first only by way of the second.
    let (_, left) = succeed(&table);
    assert_eq!(uniques(&left), [1, 2, 3]);
    assert_eq!(left.iter().map(|arrived| arrived.is_awaited).collect::<Vec<_>>(), [true, false, false]);
    answer(&mut table, oldest);
    assert_eq!((table.count(), uniques(&succeed(&table).1)), (0, Vec::new()));
}

#[test]
fn a_write_that_was_refused_keeps_nothing_and_is_not_kept() {
    let mut table = table();
    let oldest = write(&mut table, 1, 0, &[1; 512]);
    table.payload(oldest, 512, &pool());
    let bytes = request(2, 16, 0, 512, &[2; 512]);
    put(&mut table, &bytes);
    let refused = table.arrived(bytes.len());
    answer(&mut table, refused.slot);
    assert_eq!(uniques(&succeed(&table).1), [1]);
}

#[test]
fn a_full_table_takes_no_more_until_one_has_gone() {
    let mut table = table();
    let read = request(1, 15, 0, 512, &[]);
    let mut slots = Vec::new();
    while table.inbox().is_some() {
        put(&mut table, &read);
        slots.push(table.arrived(read.len()).slot);
    }
    assert_eq!(slots.len(), SLOTS);
    answer(&mut table, slots[100]);
    assert!(table.inbox().is_some());
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    runtime.block_on(table.room());
}

/// A slow replica holds payloads for long after they were answered.
#[test]
fn payloads_that_are_held_do_not_keep_requests_out() {
    let (mut table, pool) = (table(), pool());
    for length in [4096, MIB] {
        let mut held = Vec::new();
        for number in 0..2000u64 {
            let slot = write(&mut table, number + 1, 0, &vec![number as u8; length]);
            held.push(table.payload(slot, length, &pool));
            answer(&mut table, slot);
            if length == MIB && number == 300 {
                break;
            }
        }
        assert!(
            held.iter().enumerate().all(|(number, bytes)| bytes.iter().all(|byte| *byte == number as u8))
        );
        assert_eq!(table.count(), 0);
    }
}

#[test]
fn what_was_agreed_on_is_found_again() {
    let table = table();
    assert!(table.session().is_none());
    let offer = Offer::of(7, 36, u32::MAX);
    let session = Session::negotiate(offer).expect("it is new enough");
    table.agree(session);
    let (successor, _) = succeed(&table);
    assert_eq!(successor.session(), Some(Ok(session)));
    // A version that agreed on something else.
    poke(&table, SESSION_AT + 4, &1u32.to_ne_bytes());
    assert!(matches!(refusal(&table), TakeOverError::Damaged("what was agreed on")));
}

#[test]
fn a_table_of_another_version_or_device_is_left_alone() {
    let table = table();
    let file = || table.file().try_clone_to_owned().expect("a descriptor");
    for (identity, words) in [
        (Identity { volume: [8; 16], ..IDENTITY }, "it is another volume's"),
        (Identity { size_bytes: 1 << 20, ..IDENTITY }, "it is of another size"),
        (Identity { read_only: true, ..IDENTITY }, "it is writable where"),
    ] {
        let refused = Table::take_over(file(), identity).err().expect("a refusal");
        assert!(matches!(refused, TakeOverError::Other(told) if told.starts_with(words)), "{refused}");
    }
    poke(&table, 8, &2u32.to_ne_bytes());
    assert!(matches!(refusal(&table), TakeOverError::Newer { found: 2, known: 1 }));
    poke(&table, 0, b"nonsense");
    assert!(matches!(refusal(&table), TakeOverError::Foreign));
}

#[test]
fn a_newer_version_of_another_size_is_told_as_newer() {
    for (bytes, expected) in [(4096, "version 9"), (2 * TABLE_BYTES, "version 9"), (10, "no table")] {
        let file = memfd_create("test", MemfdFlags::CLOEXEC).expect("memory");
        ftruncate(&file, bytes as u64).expect("memory");
        let mut header = Header::new(IDENTITY).as_bytes().to_vec();
        header[8..12].copy_from_slice(&9u32.to_ne_bytes());
        pwrite(file.as_fd(), &header[..header.len().min(bytes)], 0).expect("memory can be written");
        let refused = Table::take_over(file, IDENTITY).err().expect("a refusal");
        assert!(refused.to_string().contains(expected), "{refused}");
    }
}

#[test]
fn a_damaged_table_is_left_alone() {
    let slot_at = |slot: usize, offset: usize| SLOTS_AT + slot * SLOT_BYTES + offset;
    for (at, bytes) in [
        (16, &9u32.to_ne_bytes()[..]),
        (60, &[1]),
        (slot_at(0, STAGE_AT), &9u32.to_ne_bytes()),
        (slot_at(0, PLACE_AT), &0u32.to_ne_bytes()),
        (slot_at(0, PLACE_AT), &5000u32.to_ne_bytes()),
        (slot_at(0, PLACE_AT), &((1u32 << 16) + 160).to_ne_bytes()),
        (slot_at(0, SEQUENCE_AT), &0u64.to_ne_bytes()),
        (slot_at(0, SEQUENCE_AT), &2u64.to_ne_bytes()),
        // The place of the other one's payload.
        (slot_at(0, PLACE_AT), &2u32.to_ne_bytes()),
    ] {
        let mut table = table();
        for unique in [1, 2] {
            let slot = write(&mut table, unique, 0, &[1; 512]);
            table.payload(slot, 512, &pool());
        }
        succeed(&table);
        poke(&table, at, bytes);
        assert!(matches!(refusal(&table), TakeOverError::Damaged(_)), "{at}");
    }
}

/// The kernel fails a request that it could not copy: it is told as one that makes no sense, under its own number.
#[test]
fn a_request_of_which_only_the_header_came_is_told() {
    let mut table = table();
    let mut bytes = request(3, 16, 4096, 512, &[3; 512]);
    bytes.truncate(40);
    put(&mut table, &bytes);
    let (_, left) = succeed(&table);
    assert_eq!(uniques(&left), [3]);
    assert!(left[0].call.is_err());
}

#[test]
fn random_bytes_are_refused_or_make_sense() {
    let mut state = 1u64;
    let mut random = move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    };
    for _ in 0..200 {
        let mut table = table();
        for unique in 1..5 {
            let slot = write(&mut table, unique, unique * 4096, &[1; 4096]);
            table.payload(slot, 4096, &pool());
        }
        for _ in 0..random() % 4 + 1 {
            let at = SLOTS_AT as u64 + random() % (5 * SLOT_BYTES as u64);
            poke(&table, at as usize, &[random() as u8]);
        }
        let file = table.file().try_clone_to_owned().expect("a descriptor");
        if let Ok((mut successor, left)) = Table::take_over(file, IDENTITY) {
            for arrived in left {
                if let Ok(Call::Write { length, .. }) = arrived.call {
                    assert_eq!(
                        successor.payload(arrived.slot, length as usize, &pool()).len(),
                        length as usize
                    );
                }
            }
        }
    }
}

/// The bytes of version 1: a later version reads them.
#[test]
fn the_layout_is_as_it_was_released() {
    let mut table = table();
    table.agree(Session::negotiate(Offer::of(7, 36, u32::MAX)).expect("it is new enough"));
    let slot = write(&mut table, 0x1234, 4096, &[5; 512]);
    table.payload(slot, 512, &pool());
    let read = |at: usize, length: usize| {
        let mut bytes = vec![0; length];
        pread(table.file(), &mut bytes, at as u64).expect("memory can be read");
        bytes
    };
    let golden: [&[u8]; 9] = [
        b"bm-table",
        &1u32.to_ne_bytes(),
        &512u32.to_ne_bytes(),
        &1024u32.to_ne_bytes(),
        &160u32.to_ne_bytes(),
        &[7; 16],
        &(64u64 << 20).to_ne_bytes(),
        &512u32.to_ne_bytes(),
        &0u32.to_ne_bytes(),
    ];
    assert_eq!(read(0, 56), golden.concat());
    assert_eq!(read(56, 8), blake3::hash(&golden.concat()).as_bytes()[..8]);
    let agreed: [&[u8]; 3] =
        [&36u32.to_ne_bytes(), &0x0040_8021u32.to_ne_bytes(), &(1u32 << 20).to_ne_bytes()];
    assert_eq!(read(64, 12), agreed.concat());
    let slot: [&[u8]; 4] = [
        &request(0x1234, 16, 4096, 512, &[5; 512])[..80],
        &1u64.to_ne_bytes(),
        &0u32.to_ne_bytes(),
        &1u32.to_ne_bytes(),
    ];
    assert_eq!(read(4096, 96), slot.concat());
    assert_eq!(read(4096 + 512 * 128, 512), [5; 512]);
    assert_eq!(TABLE_BYTES, 4096 + 512 * 128 + 1024 * (128 << 10) + 160 * (1 << 20));
}
