use super::*;
use std::collections::BTreeMap;

const SLOT: Place = Place::Slot { file: 0, slot: 3 };
const WHOLE: Place = Place::Whole(1);
const LOG: Place = Place::Log(9);

/// A ledger of what a writer said.
fn ledger(said: &[&str]) -> Ledger {
    let mut ledger = Ledger::default();
    for line in said {
        ledger.note(line.parse().expect("a line")).expect("it makes sense");
    }
    ledger
}

/// A slot whose first blocks are of these records; 0 is blank.
fn slot(numbers: &[u64]) -> Image {
    let mut cells = vec![Cell::Blank; SLOT_BLOCKS as usize];
    for (cell, number) in cells.iter_mut().zip(numbers) {
        *cell = if *number == 0 { Cell::Blank } else { Cell::Of(*number) };
    }
    Image { slots: BTreeMap::from([(SLOT, cells)]), ..Image::default() }
}

fn whole(number: u64) -> Image {
    Image { wholes: BTreeMap::from([(WHOLE, Some(number))]), ..Image::default() }
}

fn log(numbers: &[u64]) -> Image {
    Image { logs: BTreeMap::from([(LOG, numbers.to_vec())]), ..Image::default() }
}

fn assert_right(ledger: &Ledger, image: &Image, floor: u64) {
    let checked = ledger.check(image, Moment(floor));
    assert!(checked.is_ok(), "{image:?} at {floor}: {checked:?}");
}

fn assert_wrong(ledger: &Ledger, image: &Image, floor: u64) {
    let checked = ledger.check(image, Moment(floor));
    assert!(checked.is_err(), "{image:?} at {floor}: {checked:?}");
}

#[test]
fn what_is_durable_before_the_floor_must_be_there() {
    let ledger = ledger(&["begin 1 whole-1 0", "durable 1", "begin 2 whole-1 0", "durable 2"]);
    for (image, floors_that_allow_it) in [(Image::default(), 0..2), (whole(1), 0..4), (whole(2), 0..5)] {
        for floor in 0..5 {
            match floors_that_allow_it.contains(&floor) {
                true => assert_right(&ledger, &image, floor),
                false => assert_wrong(&ledger, &image, floor),
            }
        }
    }
}

#[test]
fn a_record_that_is_there_says_that_all_that_was_durable_before_it_is() {
    let ledger = ledger(&["begin 1 whole-1 0", "durable 1", "begin 2 log-9 0"]);
    assert_right(&ledger, &Image::default(), 0);
    assert_wrong(&ledger, &log(&[2]), 0);
    assert_right(&ledger, &Image { logs: log(&[2]).logs, ..whole(1) }, 0);
}

#[test]
fn a_block_of_a_slot_is_of_the_last_durable_record_or_a_later_one() {
    let ledger = ledger(&[
        "begin 1 slots-0/3 3",
        "durable 1",
        "begin 2 slots-0/3 2",
        "durable 2",
        "begin 3 slots-0/3 3",
    ]);
    for right in [[2, 2, 1], [3, 2, 1], [2, 3, 3], [3, 3, 3]] {
        assert_right(&ledger, &slot(&right), 4);
    }
    for wrong in [[1, 2, 1], [2, 2, 0], [2, 2, 2], [3, 1, 1]] {
        assert_wrong(&ledger, &slot(&wrong), 4);
    }
    let mut damaged = slot(&[2, 2, 1]);
    damaged.slots.get_mut(&SLOT).expect("the slot")[0] = Cell::Damaged;
    assert_right(&ledger, &damaged, 4);
    damaged.slots.get_mut(&SLOT).expect("the slot")[3] = Cell::Damaged;
    assert_wrong(&ledger, &damaged, 4);
}

#[test]
fn a_log_is_a_beginning_that_has_what_is_durable_until_it_is_removed() {
    let said = ["begin 1 log-9 0", "begin 2 log-9 0", "durable 1", "remove 3 log-9", "durable 3"];
    let before = ledger(&said[..3]);
    for right in [&[1][..], &[1, 2]] {
        assert_right(&before, &log(right), 3);
    }
    for wrong in [&[][..], &[2], &[2, 1]] {
        assert_wrong(&before, &log(wrong), 3);
    }
    assert_wrong(&before, &Image::default(), 3);
    let under_way = ledger(&said[..4]);
    assert_right(&under_way, &Image::default(), 4);
    assert_right(&under_way, &log(&[1]), 4);
    let removed = ledger(&said);
    assert_right(&removed, &Image::default(), 5);
    assert_right(&removed, &log(&[1]), 4);
    assert_wrong(&removed, &log(&[1]), 5);
}

#[test]
fn what_was_lost_for_good_does_not_come_back() {
    let mut ledger = ledger(&["begin 1 whole-1 0", "durable 1", "begin 2 whole-1 0", "begin 3 log-9 0"]);
    assert_right(&ledger, &whole(2), 2);
    assert_eq!(ledger.check(&whole(1), Moment(2)).expect("it is right").lost, 2);
    ledger.settle(&whole(1));
    assert_right(&ledger, &whole(1), 0);
    for wrong in [whole(2), Image::default(), Image { logs: log(&[3]).logs, ..whole(1) }] {
        assert_wrong(&ledger, &wrong, 0);
    }
    assert!(ledger.unused_number() > 3);
    ledger.note("begin 7 whole-1 0".parse().expect("a line")).expect("it makes sense");
    assert_right(&ledger, &whole(7), 0);
}

#[test]
fn what_nobody_wrote_and_what_is_damaged_is_noticed() {
    let ledger = ledger(&["begin 1 whole-1 0", "durable 1"]);
    assert_wrong(&ledger, &whole(5), 0);
    assert_wrong(&ledger, &Image { wholes: BTreeMap::from([(WHOLE, None)]), ..Image::default() }, 0);
    assert_wrong(&ledger, &Image { foreign: vec!["core".to_owned()], ..Image::default() }, 0);
    assert_wrong(&ledger, &slot(&[1]), 0);
}

#[test]
fn a_writer_that_makes_no_sense_is_noticed() {
    let mut ledger = ledger(&["begin 1 whole-1 0"]);
    assert!(ledger.note(Line::Durable(2)).is_err());
    assert!(ledger.note(Line::Remove { number: 1, place: LOG }).is_err());
}
