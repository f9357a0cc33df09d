//! Manifests and state files of format version 1, as an older program left them (`tests/inputs/state-v1/make.sh`),
//! are read and gone on with.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

const FOLDER: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/inputs/state-v1");

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap().map(Result::unwrap) {
        let (path, target) = (entry.path(), to.join(entry.file_name()));
        match path.is_dir() {
            true => copy(&path, &target),
            false => drop(fs::copy(&path, &target).unwrap()),
        }
    }
}

/// A copy of the folder; without what the older program had made of the input, if it is to begin anew.
pub fn folder(anew: bool) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    copy(Path::new(FOLDER), folder.path());
    if anew {
        ["state", "lake", "out"]
            .iter()
            .for_each(|made| fs::remove_dir_all(folder.path().join(made)).unwrap());
    }
    folder
}

/// Takes files of the input away; gives them to be put back.
pub fn parts(folder: &Path, names: &[&str]) -> Vec<(PathBuf, Vec<u8>)> {
    let take = |name: &&str| {
        let path = folder.join("input").join(name);
        let bytes = fs::read(&path).unwrap();
        fs::remove_file(&path).unwrap();
        (path, bytes)
    };
    names.iter().map(take).collect()
}

pub fn millstream(folder: &Path, arguments: &[&str]) -> String {
    let mut command = Command::new(env!("CARGO_BIN_EXE_millstream"));
    let out = command.args(arguments).current_dir(folder).output().unwrap();
    assert!(out.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

/// The lines of the files of a folder, sorted; what is only staged is no file of it.
pub fn lines(folder: &Path) -> Vec<String> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let files = paths.filter(|path| path.is_file()).map(|path| fs::read_to_string(path).unwrap());
    let mut lines: Vec<String> =
        files.flat_map(|text| text.lines().map(str::to_owned).collect::<Vec<_>>()).collect();
    lines.sort();
    lines
}

/// What the sinks hold after the rest of the input was read and the pipeline closed.
pub fn finished(folder: &Path, parallelism: &str) -> Vec<Vec<String>> {
    let run =
        ["run", "--name", "v1", "--state", "./state", "--until-end", "--close", "--parallelism", parallelism];
    millstream(folder, &[&run[..], &["pipeline.sql"]].concat());
    let held = |sink: &str| {
        let sql = format!("SELECT * FROM {sink}");
        let arguments = ["query", "--state", "./state", "--format", "csv", "-c", &sql, "pipeline.sql"];
        let mut rows: Vec<String> = millstream(folder, &arguments).lines().map(str::to_owned).collect();
        rows.sort();
        rows
    };
    let mut found: Vec<Vec<String>> =
        ["payments_backup", "features_newest", "totals_newest"].map(held).into();
    found.extend(["out/features", "out/minutes"].map(|out| lines(&folder.join(out))));
    found
}

#[test]
fn an_older_state_goes_on_at_any_parallelism() {
    let fresh = folder(true);
    let expected = finished(fresh.path(), "2");
    let rows: Vec<usize> = expected.iter().map(Vec::len).collect();
    assert!(rows[0] == 401 && rows[3] > 380 && rows[1..].iter().all(|rows| *rows > 5), "{rows:?}");
    for parallelism in ["1", "2", "3", "4"] {
        let older = folder(false);
        for (of_older, anew) in finished(older.path(), parallelism).iter().zip(&expected) {
            assert_eq!(of_older, anew, "parallelism {parallelism}");
        }
        // The older program did not count what its nodes did: their accounts begin in the middle, and add up.
        millstream(older.path(), &["status", "--name", "v1", "--state", "./state", "pipeline.sql"]);
    }
}
