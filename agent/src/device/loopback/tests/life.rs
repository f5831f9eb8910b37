//! Starting and stopping.

use super::{Attachment, Folders, MIB, Mounted, Served, memory, obstacle, require, run};
use crate::device::loopback::{StartError, StopError, mounts};
use std::fs::{self, File};
use std::os::unix::fs::FileExt;

#[test]
fn starting_and_stopping_many_times_leaves_nothing() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    for _ in 0..20 {
        let served = Served::start(&folders, &memory).expect("a device");
        assert!(served.link.exists());
        served.stop().expect("a clean stop");
        assert_eq!(folders.leftovers(), [""; 0]);
    }
}

#[test]
fn a_device_that_is_served_is_not_started_again_nor_cleaned_up() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    assert!(matches!(Served::start(&folders, &memory), Err(StartError::Served(_))));
    assert!(matches!(folders.clean_up(), Err(StartError::Served(_))));
    File::open(&served.link).expect("the device is still there");
    served.stop().expect("a clean stop");
}

#[test]
fn a_link_that_cannot_be_made_leaves_nothing() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let foreign = folders.site().device_folder.join("data");
    fs::create_dir_all(&foreign).expect("a folder where the link should be");
    let error = Served::start(&folders, &memory).err().expect("a refusal");
    assert!(matches!(error, StartError::Io { operation: "make the link", .. }), "{error:?}");
    fs::remove_dir(&foreign).expect("the folder is untouched");
    assert_eq!(folders.leftovers(), [""; 0]);
}

#[test]
fn a_device_that_is_still_in_use_is_stopped_and_its_users_are_named() {
    require!("mkfs.ext4");
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    run("mkfs.ext4", &["-q", served.path()]);
    let mounted = Mounted::new(served.path());
    let expected = format!("mounted at {} (ext4)", mounted.path().display());
    let device = served.device.clone();
    let error = served.stop().expect_err("the device is in use");
    assert!(
        matches!(&error, StopError::InUse { user, path } if *user == expected && *path == device),
        "{error}"
    );
    assert!(File::open(device).expect("it is there").read_exact_at(&mut [0; 4096], 100 * MIB).is_err());
    drop(mounted);
    assert_eq!(folders.leftovers(), [""; 0]);
}

#[test]
fn a_connection_that_is_aborted_by_hand_is_noticed_and_can_be_stopped() {
    require!();
    let (folders, memory) = (Folders::new(), memory());
    let served = Served::start(&folders, &memory).expect("a device");
    let attachment = Attachment::of(&served.device);
    mounts::unmount_by_force(&folders.mount_point()).expect("an unmount");
    served.ended.recv().expect("the end is reported");
    assert!(attachment.file().is_some());
    served.stop().expect("a clean stop");
    assert_eq!(folders.leftovers(), [""; 0]);
    assert_eq!(attachment.file(), None);
}
