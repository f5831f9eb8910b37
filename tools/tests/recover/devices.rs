//! Block devices as targets. They need root and the loop driver.

use super::*;

/// A loop device over a file, detached with the test; mounted or not.
struct Loop {
    device: PathBuf,
    mounted_at: Option<PathBuf>,
}

fn succeeds(program: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(program).args(arguments).stderr(Stdio::null()).output().ok()?;
    output.status.success().then(|| String::from_utf8(output.stdout).unwrap().trim().to_owned())
}

impl Loop {
    /// Nothing where there is no right to have one.
    fn attach(scene: &Scene, size_bytes: u64) -> Option<Self> {
        let file = scene.path("disk");
        fs::File::create(&file).unwrap().set_len(size_bytes).unwrap();
        match succeeds("losetup", &["--find", "--show", file.to_str().unwrap()]) {
            Some(device) => Some(Self { device: device.into(), mounted_at: None }),
            None => {
                eprintln!("skipped: no loop device can be had; run as root");
                None
            }
        }
    }

    fn mount(&mut self, scene: &Scene) -> Option<()> {
        let at = scene.path("mnt");
        fs::create_dir(&at).unwrap();
        let device = self.device.to_str().unwrap();
        let mounted = succeeds("mkfs.ext4", &["-q", device])
            .and_then(|_| succeeds("mount", &[device, at.to_str().unwrap()]));
        if mounted.is_none() {
            eprintln!("skipped: ext4 cannot be made and mounted here");
        }
        mounted.map(|_| self.mounted_at = Some(at))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        if let Some(at) = &self.mounted_at {
            succeeds("umount", &[at.to_str().unwrap()]);
        }
        succeeds("losetup", &["--detach", self.device.to_str().unwrap()]);
    }
}

fn recover_to(scene: &Scene, device: &Loop, more: &[&str]) -> Ended {
    scene.usual(&device.device, more).output().unwrap().into()
}

#[test]
fn a_larger_disk_is_filled_and_its_state_is_kept_elsewhere() {
    let scene = Scene::new();
    let Some(device) = Loop::attach(&scene, SIZE.next_multiple_of(1 << 20) + (1 << 20)) else { return };
    let name = format!("dev-{}.blockmirror-recovery", device.device.file_name().unwrap().display());
    let state = scene.path("var").join(name);
    scene.host.allow(3);
    let mut running = Running(Some(scene.usual(&device.device, &[]).spawn().unwrap()));
    running.wait_until(|| {
        fs::read(&state).is_ok_and(|file| RecoveryState::decode(&file).unwrap().done_chunks() == 3)
    });
    running.kill();
    scene.host.allow(u64::MAX);
    recover_to(&scene, &device, &[]).good();
    assert_eq!(scene.host.seen().reads.len() as u64, CHUNKS, "it went on where it was");
    assert!(!state.exists());
    let (image, disk) = (fs::read(scene.path("image")).unwrap(), fs::read(&device.device).unwrap());
    assert!(disk[..SIZE as usize] == image && disk[SIZE as usize..].iter().all(|byte| *byte == 0));
    recover_to(&scene, &device, &[]).bad(5, "add --overwrite to lose that");
}

#[test]
fn a_smaller_disk_is_refused() {
    let scene = Scene::new();
    let Some(device) = Loop::attach(&scene, 16 << 20) else { return };
    recover_to(&scene, &device, &[]).bad(1, "use a larger disk");
}

#[test]
fn a_mounted_disk_is_refused_whatever_is_said() {
    let scene = Scene::new();
    let Some(mut device) = Loop::attach(&scene, 256 << 20) else { return };
    if device.mount(&scene).is_none() {
        return;
    }
    recover_to(&scene, &device, &["--overwrite"]).bad(5, "is in use");
}
