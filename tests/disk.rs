//! A disk that is full for a while: a small tmpfs, which only root can mount.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

struct Disk(PathBuf);

impl Disk {
    fn mount(path: PathBuf) -> Option<Self> {
        fs::create_dir(&path).unwrap();
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", "size=8m", "tmpfs"]).arg(&path).status();
        mounted.is_ok_and(|status| status.success()).then(|| Self(path))
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        Command::new("umount").arg("-l").arg(&self.0).status().unwrap();
    }
}

const ROWS: i64 = 20_000;

/// A pipeline on a small disk that has too little room for its rows: its folder, the disk, and the file that fills it.
fn full(test: &str) -> Option<(tempfile::TempDir, Disk, PathBuf)> {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(folder.path().join("disk")) else {
        println!("skipped {test}: only root can mount a small disk");
        return None;
    };
    // Rows that do not compress: more than the room that is left, less than the disk.
    let mut seed = 7_u64;
    let mut word = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        format!("{seed:016x}")
    };
    let row = |i: i64| {
        let note: String = (0..4).map(|_| word()).collect();
        format!("{{\"id\": {i}, \"at\": {}, \"note\": \"{note}\"}}\n", 1_767_571_200_000 + i)
    };
    fs::write(folder.path().join("in.json"), (0..ROWS).map(row).collect::<String>()).unwrap();
    let sql = "CREATE SOURCE t (id BIGINT NOT NULL, at BIGINT, note VARCHAR, event_time TIMESTAMP AS (to_timestamp_millis(at)),
        WATERMARK FOR event_time AS event_time) WITH (connector = 'files', path = './in.json', format = 'json');
        CREATE SINK kept FROM t WITH (connector = 'delta', location = './disk/lake/kept');
        CREATE SINK totals AS SELECT note, count(*) AS n FROM t GROUP BY note
        WITH (connector = 'memory', key = 'note');";
    fs::write(folder.path().join("p.sql"), sql).unwrap();
    let filler = disk.0.join("filler");
    fs::write(&filler, vec![1; (8 << 20) - (300 << 10)]).unwrap();
    Some((folder, disk, filler))
}

fn run(folder: &Path, more: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
    command.args(["run", "p.sql", "--plain", "--checkpoint", "200ms", "--state", "./disk/state"]).args(more);
    command.current_dir(folder).stderr(Stdio::piped());
    command
}

/// Every row is in the table and in the totals, once.
fn all_is_there(folder: &Path) {
    let ask = |sql: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
        let arguments = ["query", "p.sql", "--state", "./disk/state", "--format", "csv", "-c", sql];
        let out = command.args(arguments).current_dir(folder).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let all = format!("n,ids\n{ROWS},{ROWS}\n");
    assert_eq!(ask("SELECT count(*) AS n, count(DISTINCT id) AS ids FROM kept"), all);
    assert_eq!(ask("SELECT sum(n) AS n, count(*) AS ids FROM totals"), all);
}

#[test]
fn a_full_disk_is_waited_out_and_nothing_is_lost() {
    let Some((folder, _disk, filler)) = full("a_full_disk_is_waited_out_and_nothing_is_lost") else { return };
    let mut process = run(folder.path(), &["--until-end", "--close"]).spawn().unwrap();
    let mut said = String::new();
    let mut room = false;
    for line in BufReader::new(process.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        if line.contains("the disk is full") && !room {
            assert!(process.try_wait().unwrap().is_none(), "it goes on");
            fs::remove_file(&filler).unwrap();
            room = true;
        }
        said.push_str(&line);
        said.push('\n');
    }
    assert!(process.wait().unwrap().success(), "{said}");
    assert!(room && said.contains("writing goes on") || said.contains("the commit waits"), "{said}");
    all_is_there(folder.path());
}

/// Ctrl-C waits for the last checkpoint, which the disk has no room for; the second one does not.
#[test]
fn a_second_interrupt_does_not_wait_for_a_full_disk() {
    let Some((folder, _disk, filler)) = full("a_second_interrupt_does_not_wait_for_a_full_disk") else {
        return;
    };
    let mut process = run(folder.path(), &[]).spawn().unwrap();
    let (mut said, mut interrupts) = (String::new(), 0);
    for line in BufReader::new(process.stderr.take().unwrap()).lines() {
        let line = line.unwrap();
        let due = interrupts == 0 && line.contains("the disk is full")
            || interrupts == 1 && line.contains("once more");
        if due {
            let interrupt = ["-INT", &process.id().to_string()];
            assert!(Command::new("kill").args(interrupt).status().unwrap().success());
            interrupts += 1;
        }
        said.push_str(&line);
        said.push('\n');
    }
    assert_eq!(process.wait().unwrap().code(), Some(3), "{said}");
    assert!(interrupts == 2 && said.contains("ended at once") && said.contains("Nothing is lost"), "{said}");
    fs::remove_file(&filler).unwrap();
    let out = run(folder.path(), &["--until-end", "--close"]).output().unwrap();
    assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
    all_is_there(folder.path());
}
