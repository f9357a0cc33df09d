//! `millstream checkpoints`: what there is to go back to, and how.
//!
//! An older checkpoint is never put in the place of a newer one. The tables have the later epochs already, an online
//! store has newer values and offsets, and a topic cannot take records back: the rows between would be there twice, or
//! be held back. Nor are the files of an older checkpoint sure to be there, as garbage lists name what only the past
//! needs. What is sound is a *copy*: a state of its own, with a new id, under another name, whose sinks write elsewhere,
//! while all files of the checkpoint are still there. Tables refuse a state that is not theirs, so a copy with the
//! locations of the original does not start.

use clap::{Args, Subcommand};
use serde::Serialize;

use super::status::render::time_ms;
use super::table::{Column, Style, table};
use super::view::count;
use super::{Files, StateArgs, existing_state, output};
use crate::connectors::files;
use crate::error::{Error, Result};
use crate::state::manifest::{Kind, Manifest};
use crate::state::store::StateStore;
use crate::stream::clock::Clock;

#[derive(Debug, Args)]
pub struct CheckpointsArgs {
    #[command(subcommand)]
    what: What,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Lists the manifests that are kept, oldest first; a claim is the start of a process.
    Ls {
        #[command(flatten)]
        files: Files,
        #[command(flatten)]
        state: StateArgs,
        #[arg(long, value_enum, default_value_t = Format::Table)]
        format: Format,
    },
    /// Copies a checkpoint into a state of its own, from which another pipeline goes on.
    ///
    /// The copy needs another name, another folder and sinks that write elsewhere (other tables, another Redis or
    /// prefix): those of the original hold later rows already. New tables begin with the rows after the checkpoint.
    Restore {
        /// A data epoch of `checkpoints ls` whose files are all there.
        epoch: u64,
        #[command(flatten)]
        files: Files,
        #[command(flatten)]
        state: StateArgs,
        /// An empty folder, or s3://…, for the copy.
        #[arg(long, value_name = "URL")]
        into_state: Option<String>,
        /// Name of the pipeline that goes on from the copy.
        #[arg(long, value_name = "NAME")]
        into_name: Option<String>,
    },
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Format {
    Table,
    Json,
}

/// One manifest, for people and programs.
#[derive(Debug, Serialize)]
struct Listed {
    epoch: u64,
    kind: Kind,
    generation: u64,
    created_at_ms: i64,
    closed: bool,
    /// By source: the next offset of each partition.
    offsets: Vec<(String, i32, i64)>,
    watermark_us: Option<i64>,
    files: usize,
    bytes: u64,
    /// Every file is still there, so that it can be copied.
    whole: bool,
}

pub async fn run(args: CheckpointsArgs) -> Result<()> {
    match args.what {
        What::Ls { files, state, format } => {
            let (_, location) = state.target(&files)?;
            let store = state_at(&location)?;
            let present = store.files().await?;
            let listed: Vec<Listed> =
                store.manifests().await?.iter().map(|manifest| listed(manifest, &present)).collect();
            match format {
                Format::Table => output::text(&rendered(&listed)),
                Format::Json => {
                    let json = serde_json::to_string_pretty(&listed);
                    let json = json.map_err(|e| Error::internal("the list cannot be written").because(e))?;
                    output::text(&format!("{json}\n"))
                }
            }
        }
        What::Restore { epoch, files, state, into_state, into_name } => {
            let (name, location) = state.target(&files)?;
            let (Some(into_state), Some(into_name)) = (into_state, into_name) else {
                return Err(Error::user(format!("epoch {epoch} cannot take the place of newer ones in {location}")).hint(
                    "The sinks hold later rows already. Copy it with --into-state URL --into-name NAME and run the copy \
                     with other locations; or begin anew with `millstream reset`.",
                ));
            };
            restore(&name, &location, epoch, &into_state, &into_name).await
        }
    }
}

fn state_at(location: &str) -> Result<StateStore> {
    existing_state(location)?.ok_or_else(|| {
        Error::user(format!("there is no state at {location}"))
            .hint("Name the pipeline with --name, or its state with --state.")
    })
}

async fn restore(name: &str, location: &str, epoch: u64, into_state: &str, into_name: &str) -> Result<()> {
    let store = state_at(location)?;
    let manifest = store.read(epoch).await?;
    let hint = "`millstream checkpoints ls` lists what there is.";
    let Some(manifest) = manifest else {
        return Err(Error::user(format!("there is no checkpoint {epoch} at {location}")).hint(hint));
    };
    if manifest.pipeline != name {
        let message =
            format!("the state at {location} belongs to pipeline {}, not to {name}", manifest.pipeline);
        return Err(Error::user(message).hint("Give its name with --name."));
    }
    if into_name == name {
        return Err(Error::user(format!("the copy would be named {name} too"))
            .hint("Give it another name: online stores and tables know a pipeline by its name."));
    }
    if manifest.kind == Kind::Claim {
        return Err(
            Error::user(format!("epoch {epoch} is the start of a process, not a checkpoint")).hint(hint)
        );
    }
    if manifest.closed {
        return Err(Error::user(format!("epoch {epoch} closed the pipeline: every row is final"))
            .hint("Copy an earlier one, or run over all records in a new state."));
    }
    let present = store.files().await?;
    if let Some(gone) =
        manifest.referenced().into_iter().find(|path| !present.iter().any(|file| file == path))
    {
        return Err(Error::user(format!("epoch {epoch} is no longer whole: {gone} was deleted when newer epochs did \
                                        not need it"))
            .hint("Copy one that `millstream checkpoints ls` shows as whole, or run over all records in a new state."));
    }
    let target =
        StateStore::new(files::open_private(into_state)?.store, object_store::path::Path::default(), Clock);
    let copy = store.copy_to(&manifest, &target, into_name).await?;
    eprintln!("copied epoch {epoch} of {name}: {} files to {into_state}", copy.referenced().len());
    eprintln!(
        "Run it with --name {into_name} --state {into_state} and other locations of its sinks, as by --set. New tables \
         begin with the rows after the checkpoint; a Redis sink writes all its keys again, so give it another prefix."
    );
    Ok(())
}

fn listed(manifest: &Manifest, present: &[String]) -> Listed {
    let offsets = manifest.sources.iter().flat_map(|(name, source)| {
        source.partitions.iter().map(move |p| (name.clone(), p.partition, p.next_offset))
    });
    Listed {
        epoch: manifest.epoch,
        kind: manifest.kind,
        generation: manifest.generation,
        created_at_ms: manifest.created_at_ms,
        closed: manifest.closed,
        offsets: offsets.collect(),
        watermark_us: manifest.sources.values().filter_map(|source| source.watermark).min(),
        files: manifest.files.len(),
        bytes: manifest.files.iter().map(|file| file.bytes).sum(),
        whole: manifest.referenced().iter().all(|path| present.iter().any(|file| file == path)),
    }
}

fn rendered(listed: &[Listed]) -> String {
    let column = |head: &str, right: bool, cell: &dyn Fn(&Listed) -> String| {
        Column::new(head, right, 0, listed.iter().map(|row| (Style::Plain, cell(row))).collect())
    };
    let kind = |row: &Listed| match row.kind {
        Kind::Claim => "claim".to_owned(),
        Kind::Data if row.closed => "data, closed".to_owned(),
        Kind::Data => "data".to_owned(),
    };
    let offsets = |row: &Listed| {
        let each: Vec<String> =
            row.offsets.iter().map(|(_, partition, next)| format!("{partition}:{next}")).collect();
        each.join(" ")
    };
    let watermark = |row: &Listed| {
        let at = row.watermark_us.and_then(crate::runtime::coordinator::shown_watermark);
        at.map_or_else(|| "-".to_owned(), time_ms)
    };
    let columns = vec![
        column("epoch", true, &|row| row.epoch.to_string()),
        column("kind", false, &kind),
        column("generation", true, &|row| row.generation.to_string()),
        column("time", false, &|row| time_ms(row.created_at_ms)),
        column("watermark", false, &watermark),
        column("files", true, &|row| count(row.files as u64)),
        column("bytes", true, &|row| count(row.bytes)),
        column("whole", false, &|row| if row.whole { "yes" } else { "no" }.to_owned()),
        column("next offsets", false, &offsets),
    ];
    table(columns, usize::MAX).iter().map(|line| format!("{}\n", line.paint(usize::MAX, false))).collect()
}
