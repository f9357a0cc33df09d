//! Files as a source: `connector = 'files'`, NDJSON or JSON arrays, local or on S3.
//!
//! # Meaning
//! The files that match `path` are read one after the other, as one partition, in the order of their names: what is
//! exported by day or hour is nearly in the order of event time, and the rest is what the lateness is for. The offset
//! of a record is (file, record within it), packed: [`FILE_BITS`] bits for the record.
//!
//! Which files there are is found at start. The list is kept in the manifest, so that a restart knows each file by the
//! same number; files that came meanwhile are put behind it. A file must not change once it is there.

use std::sync::Arc;
use std::time::Duration;

use arrow::datatypes::SchemaRef;
use async_trait::async_trait;
use futures::TryStreamExt;
use object_store::path::Path;
use object_store::{ObjectStore, ObjectStoreExt};
use tokio::runtime::Handle;

use super::files;
use super::formats::OnError;
use super::formats::json_split::JsonSplitter;
use super::formats::records::{Intent, Raw, Records};
use super::{PartitionInfo, SourceBatch, SourceConnector, SourceReader};
use crate::error::{Error, Result};
use crate::sql::options::Options;
use crate::stream::{Place, Positions};

/// Bits of an offset that count the records of a file.
pub const FILE_BITS: u32 = 36;
/// Bytes that are read at a time.
const PIECE: u64 = 8 << 20;
const PLACE: Place = Place(0);

/// Options of the connector.
#[derive(Debug, Clone)]
pub struct FilesConfig {
    pub columns: SchemaRef,
    /// A path, a folder, or a pattern with `*` and `?` in its last parts.
    pub path: String,
    pub on_error: OnError,
}

impl FilesConfig {
    /// # Errors
    /// User: an option is missing or wrong.
    pub fn from_options(options: &mut Options, columns: SchemaRef) -> Result<Self> {
        let path = options.required("path")?;
        options.choice("format", &["json"])?;
        Ok(Self { columns, path, on_error: OnError::from_options(options)? })
    }
}

/// One file of the source.
#[derive(Debug, Clone)]
struct File {
    name: String,
    size: u64,
}

/// The files of a source, as found at start.
pub struct FileSource {
    config: FilesConfig,
    intent: Intent,
    store: Arc<dyn ObjectStore>,
    files: Arc<Vec<File>>,
}

impl FileSource {
    /// `known`: the files of earlier runs, in their order.
    ///
    /// # Errors
    /// External: nothing matches, a known file is gone, the store cannot be read.
    pub async fn open(name: &str, config: FilesConfig, known: &[String]) -> Result<Self> {
        let (base, pattern) = split_pattern(&config.path);
        let nothing = || {
            Error::external(format!("source {name}: no file matches {}", config.path))
                .hint("Give a file, a folder or a pattern such as './logs/*.ndjson'.")
        };
        let located = files::open_existing(&base)?.ok_or_else(nothing)?;
        let mut found: Vec<File> = located
            .store
            .list(None)
            .map_ok(|meta| File { name: meta.location.to_string(), size: meta.size })
            .try_collect()
            .await?;
        found.retain(|file| matches(&pattern, &file.name));
        found.sort_by(|a, b| a.name.cmp(&b.name));
        let mut files = Vec::new();
        for name in known {
            let at = found.iter().position(|file| file.name == *name).ok_or_else(|| {
                Error::external(format!("the file {name} of {} is gone", config.path))
                    .hint("Put it back: offsets count the files of earlier runs.")
            })?;
            files.push(found.remove(at));
        }
        files.append(&mut found);
        if files.is_empty() {
            return Err(nothing());
        }
        let intent = Intent {
            name: name.into(),
            topic: config.path.as_str().into(),
            on_error: config.on_error,
            keep_key: true,
            keep_payload: true,
        };
        Ok(Self { config, intent, store: located.store, files: Arc::new(files) })
    }

    /// Names of the files, for the manifest.
    pub fn names(&self) -> Vec<String> {
        self.files.iter().map(|file| file.name.clone()).collect()
    }

    fn end(&self) -> i64 {
        (self.files.len() as i64) << FILE_BITS
    }
}

#[async_trait]
impl SourceConnector for FileSource {
    fn topics(&self) -> Vec<Arc<str>> {
        vec![Arc::clone(&self.intent.topic)]
    }

    fn schema(&self) -> SchemaRef {
        Arc::clone(&self.config.columns)
    }

    async fn partitions(&self) -> Result<Vec<PartitionInfo>> {
        Ok(vec![PartitionInfo { topic: 0, partition: 0, low: 0, high: self.end() }])
    }

    async fn start_positions(&self, _: &[PartitionInfo]) -> Result<Positions> {
        Ok([(PLACE, 0)].into_iter().collect())
    }

    async fn reader(&self, assigned: Positions) -> Result<Box<dyn SourceReader>> {
        let records = Records::new(Arc::clone(&self.config.columns), self.intent.clone())?;
        let next = assigned.get(PLACE);
        Ok(Box::new(FileReader {
            store: Arc::clone(&self.store),
            files: Arc::clone(&self.files),
            runtime: Handle::current(),
            records,
            // A reader of no partition has nothing to say, as one that has said it all.
            next: next.unwrap_or_else(|| self.end()),
            told_end: next.is_none(),
            open: None,
        }))
    }
}

/// The file that is being read.
struct Open {
    file: usize,
    splitter: JsonSplitter,
    /// Bytes read.
    read: u64,
    /// Records cut.
    records: i64,
}

struct FileReader {
    store: Arc<dyn ObjectStore>,
    files: Arc<Vec<File>>,
    runtime: Handle,
    records: Records,
    /// The next offset.
    next: i64,
    told_end: bool,
    open: Option<Open>,
}

impl FileReader {
    fn file(&self) -> usize {
        (self.next >> FILE_BITS) as usize
    }

    /// Reads the next piece of the open file.
    fn feed(&mut self) -> Result<()> {
        let Some(open) = &mut self.open else { return Ok(()) };
        let file = &self.files[open.file];
        let end = (open.read + PIECE).min(file.size);
        if open.read == end {
            open.splitter.end();
            return Ok(());
        }
        let path = Path::parse(&file.name).map_err(|error| Error::internal("a path").because(error))?;
        let piece = self.runtime.block_on(self.store.get_range(&path, open.read..end))?;
        open.splitter.feed(&piece);
        open.read = end;
        Ok(())
    }

    /// Takes records of the open file; returns whether it is at its end.
    fn take(&mut self, max_rows: usize) -> Result<bool> {
        let Some(open) = &mut self.open else { return Ok(true) };
        while self.records.len() < max_rows {
            let Some(payload) = open.splitter.record() else {
                if open.read < self.files[open.file].size {
                    return Ok(false);
                }
                open.splitter.end();
                let Some(payload) = open.splitter.record() else { return Ok(true) };
                push(&mut self.records, payload, open.file, &mut open.records, &mut self.next)?;
                continue;
            };
            push(&mut self.records, payload, open.file, &mut open.records, &mut self.next)?;
        }
        Ok(false)
    }
}

/// Takes a record in, unless it was read before the restart.
fn push(records: &mut Records, payload: &[u8], file: usize, count: &mut i64, next: &mut i64) -> Result<()> {
    let offset = (file as i64) << FILE_BITS | *count;
    *count += 1;
    if offset < *next {
        return Ok(());
    }
    *next = offset + 1;
    records.push(Raw { partition: 0, offset, timestamp: None, key: None, payload })
}

impl SourceReader for FileReader {
    fn poll(&mut self, max_rows: usize, linger: Duration) -> Result<Option<SourceBatch>> {
        if self.told_end {
            #[expect(
                clippy::disallowed_methods,
                reason = "a reader lives on a thread of its own and may block"
            )]
            std::thread::sleep(linger);
            return Ok(None);
        }
        if self.file() < self.files.len() {
            let file = self.file();
            if self.open.as_ref().is_none_or(|open| open.file != file) {
                self.open = Some(Open { file, splitter: JsonSplitter::default(), read: 0, records: 0 });
            }
            if self.take(max_rows)? {
                self.next = (file as i64 + 1) << FILE_BITS;
                self.open = None;
            } else if self.records.len() < max_rows {
                self.feed()?;
            }
        }
        let ended = self.file() >= self.files.len();
        self.told_end = ended;
        let at_end = if ended { vec![PLACE] } else { Vec::new() };
        self.records.finish([(PLACE, self.next)].into_iter().collect(), at_end).map(Some)
    }

    fn acknowledge(&mut self, _: &Positions) {}

    /// About: the bytes left, in records of the mean size so far.
    fn lag(&self) -> i64 {
        let Some(open) = self.open.as_ref().filter(|open| open.records > 0) else { return 0 };
        let later: u64 = self.files[open.file + 1..].iter().map(|file| file.size).sum();
        let left = later + self.files[open.file].size.saturating_sub(open.read);
        i64::try_from(left * open.records.unsigned_abs() / open.read.max(1)).unwrap_or(i64::MAX)
    }
}

/// The folder that is listed, and the pattern of the names in it; a folder matches all of its files.
fn split_pattern(path: &str) -> (String, String) {
    let wild = path.find(['*', '?']);
    let cut = match wild {
        Some(at) => path[..at].rfind('/').map_or(0, |slash| slash + 1),
        None if path.ends_with('/') || std::path::Path::new(path).is_dir() => {
            return (path.trim_end_matches('/').to_owned(), "**".to_owned());
        }
        None => path.rfind('/').map_or(0, |slash| slash + 1),
    };
    let base = if cut == 0 { "." } else { &path[..cut] };
    (base.to_owned(), path[cut..].to_owned())
}

/// Whether a name fits a pattern: `*` and `?` within a part, `**` for any parts.
fn matches(pattern: &str, name: &str) -> bool {
    let (pattern, name): (Vec<&str>, Vec<&str>) = (pattern.split('/').collect(), name.split('/').collect());
    parts(&pattern, &name)
}

fn parts(pattern: &[&str], name: &[&str]) -> bool {
    match (pattern, name) {
        ([], []) => true,
        (["**", rest @ ..], _) => (0..=name.len()).any(|skipped| parts(rest, &name[skipped..])),
        ([first, rest @ ..], [part, others @ ..]) => {
            letters(first.as_bytes(), part.as_bytes()) && parts(rest, others)
        }
        _ => false,
    }
}

fn letters(pattern: &[u8], name: &[u8]) -> bool {
    match (pattern, name) {
        ([], []) => true,
        ([b'*', rest @ ..], _) => (0..=name.len()).any(|skipped| letters(rest, &name[skipped..])),
        ([b'?', rest @ ..], [_, others @ ..]) => letters(rest, others),
        ([a, rest @ ..], [b, others @ ..]) => a == b && letters(rest, others),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use arrow::array::AsArray;
    use arrow::datatypes::{DataType, Field, Int64Type, Schema};

    use super::*;

    fn config(path: String) -> FilesConfig {
        let columns = Arc::new(Schema::new(vec![Field::new("n", DataType::Int64, false)]));
        FilesConfig { columns, path, on_error: OnError::DeadLetter }
    }

    /// Everything from an offset on: values, offsets, dead letters.
    async fn read(source: &FileSource, from: i64) -> (Vec<i64>, Vec<i64>, Vec<String>) {
        let mut reader = source.reader([(PLACE, from)].into_iter().collect()).await.unwrap();
        let end = source.end();
        tokio::task::spawn_blocking(move || {
            let (mut values, mut offsets, mut dead) = (Vec::new(), Vec::new(), Vec::new());
            loop {
                let Some(batch) = reader.poll(3, Duration::ZERO).unwrap() else { break };
                assert!(batch.rows.num_rows() <= 3);
                values.extend_from_slice(batch.rows.column(0).as_primitive::<Int64Type>().values());
                offsets.extend_from_slice(batch.offset.values());
                dead.extend(batch.dead.into_iter().map(|letter| letter.kind.to_owned()));
                assert_eq!(batch.at_end.len(), usize::from(batch.reached.get(PLACE) == Some(end)));
            }
            (values, offsets, dead)
        })
        .await
        .unwrap()
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn files_are_one_log_that_can_be_resumed_anywhere() {
        let folder = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| std::fs::write(folder.path().join(name), text).unwrap();
        write("b.json", "[{\"n\": 5},\n{\"n\": 6}, nonsense, {\"n\": 7}]");
        write("a.json", "{\"n\": 1}\n{\"n\": 2}\n{\"n\": null}\n{\"n\": 3}\n{\"n\": 4}");
        write("c.txt", "{\"n\": 9}");
        let path = format!("{}/*.json", folder.path().display());
        let source = FileSource::open("s", config(path.clone()), &[]).await.unwrap();
        assert_eq!(source.names(), ["a.json", "b.json"]);
        let (values, offsets, dead) = read(&source, 0).await;
        assert_eq!(values, [1, 2, 3, 4, 5, 6, 7]);
        assert_eq!(dead, ["missing_field", "not_json"]);
        assert_eq!(offsets[4..], [1 << FILE_BITS, 1 << FILE_BITS | 1, 1 << FILE_BITS | 3]);
        for (at, offset) in offsets.iter().enumerate() {
            assert_eq!(read(&source, *offset).await.0, values[at..]);
        }
        // A file that came meanwhile stands behind those known.
        write("0.json", "{\"n\": 8}");
        let again = FileSource::open("s", config(path.clone()), &source.names()).await.unwrap();
        assert_eq!(read(&again, source.end()).await.0, [8]);
        std::fs::remove_file(folder.path().join("a.json")).unwrap();
        let error = FileSource::open("s", config(path), &source.names()).await.err().unwrap();
        assert!(error.message().contains("a.json"), "{error}");
    }

    #[test]
    fn patterns() {
        for (pattern, name, fits) in [
            ("*.json", "a.json", true),
            ("*.json", "x/a.json", false),
            ("**/*.json", "x/y/a.json", true),
            ("**", "x/y", true),
            ("a?.j*", "ab.json", true),
            ("a?.j*", "a.json", false),
        ] {
            assert_eq!(matches(pattern, name), fits, "{pattern} {name}");
        }
        assert_eq!(
            split_pattern("s3://b/logs/2026-*/x.json"),
            ("s3://b/logs/".into(), "2026-*/x.json".into())
        );
        assert_eq!(split_pattern("x.json"), (".".into(), "x.json".into()));
    }
}
