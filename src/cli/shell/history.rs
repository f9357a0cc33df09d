//! What was typed before: a file with an entry per line, line breaks as `\n`, backslashes doubled.
//!
//! Entries are appended as they are typed, so that shells side by side lose nothing. What begins with a blank is not
//! kept. The file belongs to its owner alone; it is cut to the newest entries when a shell starts.

use std::fs::{self, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};

/// Entries that a shell knows.
const MOST: usize = 1_000;

#[derive(Debug, Default)]
pub struct History {
    file: Option<PathBuf>,
    /// Oldest first.
    entries: Vec<String>,
}

impl History {
    /// Without a file, or with one that cannot be read, entries live as long as the shell.
    pub fn open(file: Option<PathBuf>) -> Self {
        let text = file.as_deref().and_then(|file| fs::read_to_string(file).ok()).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        let newest = &lines[lines.len().saturating_sub(MOST)..];
        if let Some(file) = &file
            && lines.len() > 2 * MOST
        {
            // What cannot be cut now is cut another time.
            rewrite(file, newest).ok();
        }
        Self { file, entries: newest.iter().map(|line| plain(line)).collect() }
    }

    pub fn entries(&self) -> &[String] {
        &self.entries
    }

    pub fn add(&mut self, entry: &str) {
        let entry = entry.trim_end();
        if entry.is_empty()
            || entry.starts_with(char::is_whitespace)
            || self.entries.last().is_some_and(|last| last == entry)
        {
            return;
        }
        self.entries.push(entry.to_owned());
        if self.entries.len() > MOST {
            self.entries.remove(0);
        }
        if let Some(file) = &self.file {
            // A shell without history is still a shell.
            append(file, &escaped(entry)).ok();
        }
    }
}

fn append(file: &Path, line: &str) -> std::io::Result<()> {
    let mut options = OpenOptions::new();
    options.append(true).create(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(file)?.write_all(format!("{line}\n").as_bytes())
}

fn rewrite(file: &Path, lines: &[&str]) -> std::io::Result<()> {
    let folder = file.parent().unwrap_or(Path::new("."));
    let mut fresh = tempfile::NamedTempFile::new_in(folder)?;
    fresh.write_all(format!("{}\n", lines.join("\n")).as_bytes())?;
    fresh.persist(file)?;
    Ok(())
}

fn escaped(entry: &str) -> String {
    entry.replace('\\', "\\\\").replace('\n', "\\n")
}

fn plain(line: &str) -> String {
    let mut text = String::with_capacity(line.len());
    let mut chars = line.chars();
    while let Some(c) = chars.next() {
        match (c, c == '\\') {
            (_, true) => text.push(match chars.next() {
                Some('n') => '\n',
                other => other.unwrap_or('\\'),
            }),
            (c, _) => text.push(c),
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn entries_outlive_the_shell() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("history");
        let mut first = History::open(Some(file.clone()));
        let typed = ["SELECT '\\n',\n  1;", "\\d", "\\d", " SELECT 'secret';", "ä\\"];
        typed.iter().for_each(|entry| first.add(entry));
        let kept = ["SELECT '\\n',\n  1;", "\\d", "ä\\"];
        assert_eq!(first.entries(), kept);
        let second = History::open(Some(file.clone()));
        assert_eq!(second.entries(), kept);
        let many: Vec<String> = (0..=2 * MOST).map(|n| n.to_string()).collect();
        fs::write(&file, many.join("\n")).unwrap();
        assert_eq!(History::open(Some(file.clone())).entries().len(), MOST);
        let cut = fs::read_to_string(&file).unwrap();
        assert!(cut.lines().count() == MOST && cut.ends_with(&format!("\n{}\n", 2 * MOST)));
        #[cfg(unix)]
        {
            use std::os::unix::fs::PermissionsExt;
            assert_eq!(fs::metadata(&file).unwrap().permissions().mode() & 0o077, 0);
        }
    }
}
