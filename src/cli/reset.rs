//! `millstream reset`: the state is deleted, the next start begins anew.
//!
//! A running process is fenced first, by a claim that has no progress; that claim stays, so that the process finds its
//! next epoch taken, and epochs and generations stay above those that sinks know.

use clap::Args;

use super::view::count;
use super::{Files, StateArgs, existing_state, load};
use crate::error::{Error, Result};
use crate::plan::{OnlineKind, SinkKind, SinkPlan};
use crate::state::manifest::Manifest;

#[derive(Debug, Args)]
pub struct ResetArgs {
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    state: StateArgs,
    /// Deletes; without it, says what would be deleted.
    #[arg(long)]
    yes: bool,
}

/// # Errors
/// User: without `--yes`; the state is another pipeline's. Fenced: a process claimed the pipeline at the same time.
/// External: the store failed.
pub async fn run(args: ResetArgs) -> Result<()> {
    let (name, location) = args.state.target(&args.files)?;
    let store = existing_state(&location)?;
    let latest = match &store {
        Some(store) => store.latest().await?,
        None => None,
    };
    let (Some(store), Some(manifest)) = (store, latest) else {
        eprintln!("there is no state at {location}: nothing to reset");
        return Ok(());
    };
    let sinks = sinks(&args.files, &manifest).await?;
    let bytes: u64 = manifest.files.iter().map(|file| file.bytes).sum();
    let rows = |segments: &[crate::state::manifest::Segment]| count(segments.iter().map(|s| s.rows).sum());
    let doing = if args.yes { "deletes" } else { "would delete" };
    eprintln!(
        "reset of pipeline {} {doing} its state at {location}: epoch {}, {} state files ({} bytes), {} late rows of the \
         ledger, {} dead letters",
        manifest.pipeline,
        manifest.epoch,
        count(manifest.files.len() as u64),
        count(bytes),
        rows(&manifest.ledger),
        rows(&manifest.dead_letters),
    );
    eprintln!(
        "The next start reads the source's history, if there is one, then the topic; without, from scan_startup. What sinks hold stays; then:"
    );
    sinks.iter().for_each(|line| eprintln!("  {line}"));
    if !args.yes {
        let hint = "Copy the state first if its dead letters may still be wanted, then give --yes.";
        return Err(Error::user("nothing was deleted: reset needs --yes").hint(hint));
    }
    match store.reset(&name).await? {
        Some(empty) => eprintln!("deleted; the state begins anew at epoch {}", empty.epoch),
        None => eprintln!("the state was deleted by somebody else meanwhile"),
    }
    Ok(())
}

/// What each sink means for the next start.
async fn sinks(files: &Files, manifest: &Manifest) -> Result<Vec<String>> {
    if files.files.iter().any(|path| path.exists()) {
        let plan = crate::plan::sinks::plan(&load(files)?, &[]).await?;
        let backup = plan
            .source()
            .and_then(|(_, source)| source.backup.as_ref().map(crate::plan::source::Backup::location));
        return Ok(plan.sinks().map(|(_, sink)| consequence(sink, backup.as_deref())).collect());
    }
    let tables = manifest.commits.iter().map(|commit| table(&commit.sink, &commit.location));
    Ok(tables.chain(["give the SQL files to hear of sinks other than tables".to_owned()]).collect())
}

fn table(sink: &str, location: &str) -> String {
    format!(
        "{sink}: the table {location} belongs to the old state, the next start refuses it: remove it, or write elsewhere"
    )
}

/// `backup`: location of the source's history.
#[cfg_attr(not(feature = "delta"), expect(unused_variables, reason = "a backup is a Delta table"))]
fn consequence(sink: &SinkPlan, backup: Option<&str>) -> String {
    let name = &sink.name;
    match &sink.kind {
        #[cfg(feature = "delta")]
        SinkKind::Delta(config) if backup == Some(config.location.as_str()) => {
            format!("{name}: the backup {} goes on at its own offsets", config.location)
        }
        #[cfg(feature = "delta")]
        SinkKind::Delta(config) => table(name, &config.location),
        SinkKind::Ndjson(config) => format!(
            "{name}: the next start removes the files of {}: no epoch of the new state has them",
            config.location
        ),
        #[cfg(feature = "kafka")]
        SinkKind::Kafka(config) => {
            format!("{name}: what is read again is written again into topic {}", config.topic)
        }
        #[cfg(feature = "redis")]
        SinkKind::Online { store: OnlineKind::Redis(_), .. } => format!(
            "{name}: values stay served; new ones are held back until reading has passed the offsets that Redis knows. \
             Delete its keys if that is not wanted, as keys that never come again stay"
        ),
        SinkKind::Online { store: OnlineKind::Memory | OnlineKind::Held(_), .. } => {
            format!("{name}: its newest rows lived in the state and are gone")
        }
        SinkKind::Console(_) | SinkKind::Blackhole | SinkKind::Collect(_) => format!("{name}: keeps nothing"),
    }
}
