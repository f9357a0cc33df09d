//! Files by path in a query: a file, a glob, a folder, `s3://…`, the folder of a Delta table.
//!
//! A folder with a `_delta_log` is its Delta table. Otherwise the first file that has a known ending says what all are:
//! `.parquet`, `.csv`, `.json`, `.ndjson`, `.jsonl`, `.arrow`, text also with `.gz`, `.bz2`, `.xz`, `.zst`; files with
//! other endings are left out, and so are names that begin with `_` or `.`. Below a folder, folders named `column=value`
//! are columns; a glob has none.

use std::collections::HashMap;
use std::sync::Arc;

use datafusion::catalog::TableProvider;
use datafusion::datasource::listing::{ListingOptions, ListingTable, ListingTableConfig, ListingTableUrl};
use datafusion::error::DataFusionError;
use datafusion::execution::session_state::SessionState;
use datafusion::prelude::SessionContext;
use futures::{StreamExt, TryStreamExt};
use url::Url;

use crate::connectors::files;
use crate::error::{Error, Result};

/// The endings of what can be read, and the format that each is.
const FORMATS: [(&str, &str); 6] = [
    ("parquet", "parquet"),
    ("csv", "csv"),
    ("json", "json"),
    ("ndjson", "json"),
    ("jsonl", "json"),
    ("arrow", "arrow"),
];

const WILD: [char; 3] = ['*', '?', '['];

/// `*` stays within one folder, `**` is any number of them.
const MATCHING: glob::MatchOptions = glob::MatchOptions {
    case_sensitive: true,
    require_literal_separator: true,
    require_literal_leading_dot: false,
};

const GLOBS: &str = "* and ? stand for letters of one name, ** for folders, [0-9] for one letter.";

/// Whether a name in a FROM is a path.
pub fn is_path(name: &str) -> bool {
    name.contains('/') || ending(name).is_some()
}

/// The files as a table.
///
/// # Errors
/// User: nothing that can be read is there. External: the store failed, files are damaged.
pub async fn open(session: &SessionContext, path: &str) -> Result<Arc<dyn TableProvider>> {
    #[cfg(feature = "delta")]
    if !path.contains(WILD) && ending(path).is_none() {
        use crate::connectors::delta::table;
        if table::exists(path).await? {
            return table::provider(path).await;
        }
    }
    listed(session, path).await.map_err(|error| match error {
        Failed::Absent => Error::user(format!("there is nothing to read at {path}")).hint(
            "Files end with .parquet, .csv, .json, .ndjson, .jsonl or .arrow; a folder may be a Delta table.",
        ),
        Failed::Own(error) => error,
        Failed::Theirs(error) => Error::external(format!("{path} cannot be read"))
            .because(error.strip_backtrace())
            .hint("Check the path, and that the files are what their endings say."),
    })
}

enum Failed {
    Absent,
    Own(Error),
    Theirs(DataFusionError),
}

impl From<DataFusionError> for Failed {
    fn from(error: DataFusionError) -> Self {
        Self::Theirs(error)
    }
}

async fn listed(session: &SessionContext, path: &str) -> Result<Arc<dyn TableProvider>, Failed> {
    let (base, pattern) = split(path);
    let url = located(session, base)?;
    let state = session.state();
    let store = state.runtime_env().object_store(&url)?;
    let pattern = pattern
        .map(glob::Pattern::new)
        .transpose()
        .map_err(|error| Failed::Own(Error::user(format!("{path} is no glob")).because(error).hint(GLOBS)))?;
    let mut files = match &pattern {
        None => url.list_all_files(&state, &store, "").await?,
        // DataFusion looks into no folder but those named column=value, and leaves these out of account in its globs.
        Some(_) => store.list(Some(url.prefix())).map_err(DataFusionError::from).boxed(),
    };
    let mut first = None;
    let mut matching = Vec::new();
    while let Some(file) = files.next().await {
        let location = file?.location;
        let below = url.strip_prefix(&location).map(|parts| parts.collect::<Vec<_>>()).unwrap_or_default();
        let hidden = below.iter().any(|part| part.starts_with(['.', '_']) && !part.contains('='));
        let Some(found) = location.filename().filter(|_| !hidden).and_then(ending) else { continue };
        if pattern.as_ref().is_some_and(|pattern| !pattern.matches_with(&below.join("/"), MATCHING)) {
            continue;
        }
        let whole = &first.get_or_insert(found).whole;
        if pattern.is_none() {
            break;
        }
        if location.as_ref().ends_with(whole.as_str()) {
            matching.push(location);
        }
    }
    drop(files);
    let options = options(&state, &first.ok_or(Failed::Absent)?)?;
    let config = match pattern {
        None => ListingTableConfig::new(url).with_listing_options(options),
        Some(_) => {
            let files = matching.iter().map(|file| of_file(&url, file)).collect::<Result<_, _>>()?;
            ListingTableConfig::new_with_multi_paths(files).with_listing_options(options)
        }
    };
    let config = config.infer_partitions_from_path(&state).await?.infer_schema(&state).await?;
    Ok(Arc::new(ListingTable::try_new(config)?))
}

/// The folder above the first wildcard, and what is below it.
fn split(path: &str) -> (&str, Option<&str>) {
    match path.find(WILD) {
        None => (path, None),
        Some(wild) => {
            let (base, pattern) = path.split_at(path[..wild].rfind('/').map_or(0, |slash| slash + 1));
            (if base.is_empty() { "./" } else { base }, Some(pattern))
        }
    }
}

/// The URL of a path without wildcards, its store known to the session.
fn located(session: &SessionContext, path: &str) -> Result<ListingTableUrl, Failed> {
    let wrong = |error: url::ParseError| {
        Failed::Own(
            Error::user(format!("{path} is no location")).because(error).hint("Write s3://bucket/path."),
        )
    };
    match path.split_once("://").map(|(scheme, _)| scheme) {
        None | Some("file") => Ok(ListingTableUrl::parse(path)?),
        Some("s3") => {
            // What has no ending is a folder.
            let folder = ending(path).is_none() && !path.ends_with('/');
            let url = Url::parse(&format!("{path}{}", if folder { "/" } else { "" })).map_err(wrong)?;
            session.register_object_store(&url, files::bucket(&url).map_err(Failed::Own)?);
            Ok(ListingTableUrl::try_new(url, None)?)
        }
        Some(other) => Err(Failed::Own(
            Error::user(format!("{path}: the scheme {other} is not known"))
                .hint("Give a local path or s3://bucket/path."),
        )),
    }
}

/// Makes the bucket of an `s3://` path known to the session, so that COPY can write there.
///
/// # Errors
/// External: settings that are missing.
pub fn know_bucket(session: &SessionContext, path: &str) -> Result<()> {
    if let Some(url) = Url::parse(path).ok().filter(|url| url.scheme() == "s3") {
        session.register_object_store(&url, files::bucket(&url)?);
    }
    Ok(())
}

/// A file of the same store.
fn of_file(base: &ListingTableUrl, file: &object_store::path::Path) -> Result<ListingTableUrl, Failed> {
    let mut url: Url = base.get_url().clone();
    // The percent signs of a path are its own; a URL has them for others.
    url.set_path(&file.as_ref().replace('%', "%25"));
    Ok(ListingTableUrl::try_new(url, None)?)
}

/// How a file name ends: format and compression.
struct Ending {
    format: &'static str,
    compression: Option<&'static str>,
    /// Both, as they stand there.
    whole: String,
}

fn ending(name: &str) -> Option<Ending> {
    let mut parts = name.rsplit('.');
    let mut last = parts.next()?;
    let mut compression = None;
    let known = [("gz", "gzip"), ("bz2", "bzip2"), ("xz", "xz"), ("zst", "zstd")];
    let mut whole = format!(".{last}");
    if let Some((_, found)) = known.into_iter().find(|(end, _)| last.eq_ignore_ascii_case(end)) {
        compression = Some(found);
        last = parts.next()?;
        whole = format!(".{last}{whole}");
    }
    parts.next()?;
    let (_, format) = FORMATS.into_iter().find(|(end, _)| last.eq_ignore_ascii_case(end))?;
    Some(Ending { format, compression, whole })
}

fn options(state: &SessionState, ending: &Ending) -> Result<ListingOptions, Failed> {
    let mut settings = HashMap::new();
    if let Some(compression) = ending.compression {
        settings.insert("format.compression".to_owned(), compression.to_owned());
    }
    let factory = state.get_file_format_factory(ending.format).ok_or(Failed::Absent)?;
    let format = factory.create(state, &settings)?;
    Ok(ListingOptions::new(format).with_file_extension(ending.whole.clone()))
}
