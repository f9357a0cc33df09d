//! `--sandbox ROOT`: which files and buckets SQL may name.
//!
//! A local path must lie inside a root after `..` and symlinks are resolved, those of parts that do not exist yet
//! included; what it reads must hold no symlink that leads out. A remote location must lie below a remote root
//! (`s3://bucket/prefix`). Paths are resolved when SQL is read: the sandbox is no protection against another process
//! that changes folders meanwhile.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::{Component, Path, PathBuf};

use url::Url;

use crate::error::{Error, Result};

/// Symlinks that are followed on one path, as in Linux.
const MOST_LINKS: usize = 40;

/// Without roots everything is allowed.
#[derive(Debug, Clone, Default)]
pub struct Sandbox {
    roots: Vec<Root>,
    shown: String,
}

#[derive(Debug, Clone)]
enum Root {
    Folder(PathBuf),
    Bucket { host: String, prefix: String },
}

impl Sandbox {
    /// # Errors
    /// User: a root that is no folder and no `s3://…`.
    pub fn new(roots: &[String]) -> Result<Self> {
        let root = |text: &String| match remote(text)? {
            Some((host, prefix)) => Ok(Root::Bucket { host, prefix }),
            None => {
                let folder = local(text).canonicalize().ok().filter(|path| path.is_dir());
                folder.map(Root::Folder).ok_or_else(|| {
                    Error::user(format!("--sandbox {text} is no folder"))
                        .hint("Give a folder that exists, or s3://bucket/prefix.")
                })
            }
        };
        Ok(Self { roots: roots.iter().map(root).collect::<Result<_>>()?, shown: roots.join(", ") })
    }

    /// Whether anything is allowed.
    pub fn is_open(&self) -> bool {
        self.roots.is_empty()
    }

    /// Whether a location may be named. With `reads`, what lies below it is looked at too.
    ///
    /// # Errors
    /// User: it lies outside.
    pub fn check(&self, location: &str, reads: bool) -> Result<()> {
        if self.is_open() {
            return Ok(());
        }
        let inside = match remote(location)? {
            Some((host, path)) => self.holds_remote(&host, &path),
            None => self.holds_local(&local(location), reads)?,
        };
        if inside {
            return Ok(());
        }
        let hint = "Use a place inside the sandbox, or start with another --sandbox for this one.";
        Err(Error::user(format!("{location} lies outside the sandbox {}", self.shown)).hint(hint))
    }

    fn holds_remote(&self, host: &str, path: &str) -> bool {
        self.roots.iter().any(|root| match root {
            Root::Bucket { host: bucket, prefix } => {
                let below = path.strip_prefix(prefix.as_str());
                bucket == host
                    && below.is_some_and(|rest| prefix.is_empty() || rest.is_empty() || rest.starts_with('/'))
            }
            Root::Folder(_) => false,
        })
    }

    fn holds_local(&self, path: &Path, reads: bool) -> Result<bool> {
        let (base, pattern) = split_pattern(path);
        if pattern.components().any(|part| part == Component::ParentDir) {
            return Ok(false);
        }
        let Some(base) = resolve(&base)? else { return Ok(false) };
        Ok(self.holds_resolved(&base) && (!reads || self.leads_out(&base)?.is_none()))
    }

    fn holds_resolved(&self, path: &Path) -> bool {
        self.roots.iter().any(|root| matches!(root, Root::Folder(folder) if path.starts_with(folder)))
    }

    /// A symlink below a folder that leads out.
    fn leads_out(&self, folder: &Path) -> Result<Option<PathBuf>> {
        let mut folders = vec![folder.to_owned()];
        while let Some(folder) = folders.pop() {
            // A file, or nothing yet.
            let Ok(entries) = std::fs::read_dir(&folder) else { continue };
            for entry in entries.flatten() {
                let Ok(kind) = entry.file_type() else { continue };
                if kind.is_dir() {
                    folders.push(entry.path());
                } else if kind.is_symlink() {
                    match resolve(&entry.path())? {
                        Some(target) if self.holds_resolved(&target) => {}
                        _ => return Ok(Some(entry.path())),
                    }
                }
            }
        }
        Ok(None)
    }
}

/// Bucket and path of an `s3://` location; `None` for a local one.
fn remote(location: &str) -> Result<Option<(String, String)>> {
    let refused = || {
        Error::user("a location is a path, file://… or s3://bucket/prefix")
            .hint("Write it in one of these forms.")
    };
    // Whoever opens the location takes `file:/x` for a URL as well.
    match Url::parse(location) {
        Ok(url) if url.scheme() == "s3" && location.starts_with("s3://") => {
            let path = object_store::path::Path::from_url_path(url.path()).map_err(|_| refused())?;
            let host = url.host_str().ok_or_else(refused)?;
            Ok(Some((host.to_owned(), path.to_string())))
        }
        Ok(url) if url.scheme() == "file" && location.starts_with("file://") => Ok(None),
        Ok(_) => Err(refused()),
        Err(_) if location.contains("://") && !location.starts_with("file://") => Err(refused()),
        Err(_) => Ok(None),
    }
}

/// As [`files::open`](super::files::open) understands it.
fn local(location: &str) -> PathBuf {
    let url = location.starts_with("file:").then(|| Url::parse(location).ok()?.to_file_path().ok());
    url.flatten().unwrap_or_else(|| PathBuf::from(location.trim_start_matches("file://")))
}

/// The leading parts without `*`, `?` and `[`, and the rest.
fn split_pattern(path: &Path) -> (PathBuf, PathBuf) {
    let plain = |part: &Component<'_>| !part.as_os_str().to_string_lossy().contains(['*', '?', '[']);
    let base = path.components().take_while(plain).collect();
    (base, path.components().skip_while(plain).collect())
}

/// The path without `.`, `..` and symlinks; parts that do not exist stay as they are. `None`: links go round.
fn resolve(path: &Path) -> Result<Option<PathBuf>> {
    let start = std::path::absolute(path)
        .map_err(|error| Error::user(format!("{} is no path", path.display())).because(error))?;
    let parts = |path: &Path| -> Vec<OsString> {
        path.components().map(|part| part.as_os_str().to_owned()).collect()
    };
    let mut left: VecDeque<OsString> = parts(&start).into();
    let (mut resolved, mut links) = (PathBuf::new(), 0);
    while let Some(part) = left.pop_front() {
        if part == ".." {
            resolved.pop();
            continue;
        }
        if part == "." {
            continue;
        }
        // An absolute target of a link begins at the root again.
        resolved.push(&part);
        if let Ok(target) = std::fs::read_link(&resolved) {
            links += 1;
            if links > MOST_LINKS {
                return Ok(None);
            }
            resolved.pop();
            for part in parts(&target).into_iter().rev() {
                left.push_front(part);
            }
        }
    }
    Ok(Some(resolved))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn sandbox(roots: &[&str]) -> Sandbox {
        Sandbox::new(&roots.iter().map(|root| (*root).to_owned()).collect::<Vec<_>>()).unwrap()
    }

    #[cfg(unix)]
    #[test]
    fn local_paths_lie_inside_after_everything_is_resolved() {
        use std::os::unix::fs::symlink;
        let folder = tempfile::tempdir().unwrap();
        let (root, outside) = (folder.path().join("root"), folder.path().join("outside"));
        for made in [root.join("a/b"), root.join("linked"), outside.clone(), folder.path().join("root2")] {
            std::fs::create_dir_all(made).unwrap();
        }
        symlink(&outside, root.join("out")).unwrap();
        symlink("a/b", root.join("in")).unwrap();
        symlink("../../outside", root.join("a/up")).unwrap();
        symlink("round", root.join("round")).unwrap();
        symlink(outside.join("secret"), root.join("linked/x.csv")).unwrap();
        let root = root.to_string_lossy().into_owned();
        let allowed = sandbox(&[&root]);
        let checked = |path: &str, reads: bool| allowed.check(&format!("{root}{path}"), reads).is_ok();
        for inside in
            ["", "/a", "/new/table", "/a/../a/b", "/in/new", "/in/../x", "/a/*.csv", "/a/./b", "/..a"]
        {
            assert!(checked(inside, false), "{inside}");
        }
        let beyond = [
            "/..",
            "2",
            "/../outside",
            "/a/../../root2",
            "/out",
            "/out/x",
            "/a/up/x",
            "/in/../../../outside",
            "/round/x",
            "/new/../../x",
            "/a/*/../../../x",
            "/linked/../out/x",
        ];
        for path in beyond {
            assert!(!checked(path, false), "{path}");
        }
        assert!(checked("/linked", false) && !checked("/linked", true) && !checked("/linked/*.csv", true));
        assert!(checked("/a/b", true) && !checked("", true));
        let url = Url::from_file_path(&root).unwrap();
        assert!(allowed.check(&format!("{url}/a"), false).is_ok());
        for path in ["/%2e%2e/outside", "/../outside", "/a/%2E./../outside"] {
            assert!(allowed.check(&format!("{url}{path}"), false).is_err(), "{path}");
        }
        for path in
            ["file:/etc/passwd", "FILE:///etc/passwd", "http://x/y", "s3://b/x", "gs://b/x", "/etc/passwd"]
        {
            assert!(allowed.check(path, true).is_err(), "{path}");
        }
        let error = allowed.check("/etc/passwd", true).unwrap_err();
        assert!(error.message().contains("/etc/passwd lies outside the sandbox"), "{error}");
    }

    #[test]
    fn remote_locations_lie_below_a_remote_root() {
        let allowed = sandbox(&["s3://lake/team", "s3://own"]);
        for inside in ["s3://lake/team", "s3://lake/team/x", "s3://lake/team/../team/y", "s3://own/any"] {
            assert!(allowed.check(inside, true).is_ok(), "{inside}");
        }
        let beyond = [
            "s3://lake/teams/x",
            "s3://lake/other",
            "s3://lake/team/../x",
            "s3://lake/team/%2e%2e/x",
            "s3://lakes/team",
            "./x",
            "/tmp",
        ];
        for path in beyond {
            assert!(allowed.check(path, true).is_err(), "{path}");
        }
        assert!(Sandbox::default().check("/etc/passwd", true).is_ok());
        assert!(Sandbox::new(&["/no/such/folder".to_owned()]).is_err());
    }
}
