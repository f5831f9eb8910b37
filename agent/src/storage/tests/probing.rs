//! What real programs put on a backing, and what is said of it.

use super::{command, text};
use crate::storage::file::{Access, File};
use crate::storage::probe::what_is_on;
use std::fs::OpenOptions;
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};
use tempfile::TempDir;

const SIZE_BYTES: u64 = 320 << 20;

fn image() -> (TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    File::create_image(&path, SIZE_BYTES).expect("an image can be made");
    (folder, path)
}

fn found(path: &std::path::Path) -> Option<String> {
    let file = File::open_backing(path, Access::ReadOnly).expect("it can be opened");
    what_is_on(&file).expect("it can be read").map(|content| content.to_string())
}

#[test]
fn what_programs_make_is_named_with_its_label() {
    let made: [(&[&str], &str); 8] = [
        (&["mkfs.ext2", "-q", "-L", "two"], "an ext2 file system labelled \"two\""),
        (&["mkfs.ext3", "-q"], "an ext3 file system"),
        (&["mkfs.ext4", "-q", "-L", "root"], "an ext4 file system labelled \"root\""),
        (&["mkfs.xfs", "-q", "-L", "data"], "an xfs file system labelled \"data\""),
        (&["mkfs.btrfs", "-q", "-L", "with a blank"], "a btrfs file system labelled \"with a blank\""),
        (&["mkswap", "-L", "spare"], "swap space labelled \"spare\""),
        (&["mkfs.vfat", "-n", "BOOT"], "a FAT file system labelled \"BOOT\""),
        (&["qemu-img", "create", "-q", "-f", "qcow2", "-o", "size=1M"], "a qcow2 image"),
    ];
    for (program, expected) in made {
        let (_folder, path) = image();
        let mut arguments = program[1..].to_vec();
        arguments.push(text(&path));
        match command(program[0], &arguments) {
            Ok(_) => {
                let length = std::fs::metadata(&path).expect("it is there").len();
                let file = OpenOptions::new().write(true).open(&path).expect("it can be opened");
                file.set_len(length.next_multiple_of(512)).expect("it can be made longer");
                drop(file);
                let found = found(&path).expect("there is something");
                assert!(found.starts_with(expected), "{found}");
            }
            Err(reason) => eprintln!("skipped: {reason}"),
        }
    }
}

#[test]
fn partition_tables_are_named() {
    for (label, expected) in [("gpt", "a GPT partition table"), ("dos", "an MBR partition table")] {
        let (_folder, path) = image();
        let started = Command::new("sfdisk")
            .args(["--quiet", "--label", label, text(&path)])
            .env("PATH", "/usr/sbin:/sbin:/usr/bin:/bin")
            .stdin(Stdio::piped())
            .spawn();
        let mut program = match started {
            Ok(program) => program,
            Err(error) => return eprintln!("skipped: sfdisk: {error}"),
        };
        let mut input = program.stdin.take().expect("it was asked for");
        std::io::Write::write_all(&mut input, b",,L\n").expect("it listens");
        drop(input);
        assert!(program.wait().expect("it ends").success());
        assert_eq!(found(&path).as_deref(), Some(expected));
    }
}

/// What needs a kernel driver to be made is put down byte by byte.
#[test]
fn parts_of_something_larger_are_named() {
    let md = b"\xfc\x4e\x2b\xa9";
    let signatures: [(u64, &[u8], &str); 8] = [
        (0, b"LUKS\xba\xbe\x00\x02", "a LUKS encrypted volume"),
        (512, b"LABELONE", "an LVM2 physical volume"),
        (4096, md, "a member of an md RAID array"),
        (SIZE_BYTES - (64 << 10), md, "a member of an md RAID array"),
        (SIZE_BYTES - (8 << 10), md, "a member of an md RAID array"),
        (128 << 10, b"\x0c\xb1\xba\x00\x00\x00\x00\x00", "a member of a ZFS pool"),
        (3, b"NTFS    ", "an NTFS file system"),
        (510, b"\x55\xaa", "data that is not zero"),
    ];
    for (at, magic, expected) in signatures {
        let (_folder, path) = image();
        let file = OpenOptions::new().write(true).open(&path).expect("it can be opened");
        file.write_all_at(magic, at).expect("it can be written");
        drop(file);
        assert_eq!(found(&path).as_deref(), Some(expected), "at {at}");
    }
}

#[test]
fn any_byte_counts_where_it_is_looked_at_and_zeroes_do_not() {
    let somewhere = [None, Some(0), Some(700_000), Some(SIZE_BYTES / 2), Some(SIZE_BYTES - 1)];
    for (zeroes_at, byte_at) in [(None, None), (Some(SIZE_BYTES / 4), None)]
        .into_iter()
        .chain(somewhere.map(|byte_at| (None, byte_at)))
    {
        let (_folder, path) = image();
        let file = OpenOptions::new().write(true).open(&path).expect("it can be opened");
        if let Some(at) = zeroes_at {
            file.write_all_at(&[0; 65536], at).expect("it can be written");
        }
        if let Some(at) = byte_at {
            file.write_all_at(b"x", at).expect("it can be written");
        }
        drop(file);
        let expected = byte_at.map(|_| "data that is not zero");
        assert_eq!(found(&path).as_deref(), expected, "{byte_at:?}");
    }
}

/// A file that was written with zeroes, as dd does, counted as data for its size.
#[test]
fn zeroes_without_holes_count_as_little_as_holes_do_and_what_lies_behind_them_counts() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    let file = std::fs::File::create(&path).expect("a file");
    for mebibyte in 0..80 {
        file.write_all_at(&vec![0; 1 << 20], mebibyte << 20).expect("it can be written");
    }
    assert_eq!(found(&path), None);
    for mebibyte in 70..79 {
        file.write_all_at(&vec![1; 1 << 20], mebibyte << 20).expect("it can be written");
    }
    assert_eq!(found(&path).as_deref(), Some("data that is not zero"));
}

#[test]
fn a_backing_of_one_sector_can_be_looked_at() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("image");
    File::create_image(&path, 512).expect("it can be made");
    assert_eq!(found(&path), None);
}
