//! A disk that is full for a while: a small tmpfs, which only root can mount.
#![cfg(target_os = "linux")]

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::PathBuf;
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

#[test]
fn a_full_disk_is_waited_out_and_nothing_is_lost() {
    let folder = tempfile::tempdir().unwrap();
    let Some(disk) = Disk::mount(folder.path().join("disk")) else {
        println!("skipped a_full_disk_is_waited_out_and_nothing_is_lost: only root can mount a small disk");
        return;
    };
    // Rows that do not compress: more than the room that is left, less than the disk.
    let mut seed = 7_u64;
    let mut word = || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        format!("{seed:016x}")
    };
    let rows = 20_000;
    let row = |i: i64| {
        let note: String = (0..4).map(|_| word()).collect();
        format!("{{\"id\": {i}, \"at\": {}, \"note\": \"{note}\"}}\n", 1_767_571_200_000 + i)
    };
    fs::write(folder.path().join("in.json"), (0..rows).map(row).collect::<String>()).unwrap();
    let sql = "CREATE SOURCE t (id BIGINT NOT NULL, at BIGINT, note VARCHAR, event_time TIMESTAMP AS (to_timestamp_millis(at)),
        WATERMARK FOR event_time AS event_time) WITH (connector = 'files', path = './in.json', format = 'json');
        CREATE SINK kept FROM t WITH (connector = 'delta', location = './disk/lake/kept');
        CREATE SINK totals AS SELECT note, count(*) AS n FROM t GROUP BY note
        WITH (connector = 'memory', key = 'note');";
    fs::write(folder.path().join("p.sql"), sql).unwrap();
    let filler = disk.0.join("filler");
    fs::write(&filler, vec![1; (8 << 20) - (300 << 10)]).unwrap();

    let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
    command.args([
        "run",
        "p.sql",
        "--plain",
        "--until-end",
        "--close",
        "--checkpoint",
        "200ms",
        "--state",
        "./disk/state",
    ]);
    let mut process = command.current_dir(folder.path()).stderr(Stdio::piped()).spawn().unwrap();
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
    let ask = |sql: &str| {
        let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
        let arguments = ["query", "p.sql", "--state", "./disk/state", "--format", "csv", "-c", sql];
        let out = command.args(arguments).current_dir(folder.path()).output().unwrap();
        assert!(out.status.success(), "{}", String::from_utf8_lossy(&out.stderr));
        String::from_utf8(out.stdout).unwrap()
    };
    let all = format!("n,ids\n{rows},{rows}\n");
    assert_eq!(ask("SELECT count(*) AS n, count(DISTINCT id) AS ids FROM kept"), all);
    assert_eq!(ask("SELECT sum(n) AS n, count(*) AS ids FROM totals"), all);
}
