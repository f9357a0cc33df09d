//! Delta: exactly-once by epoch (DESIGN §5 *Delta commit*).
//!
//! Shards write Parquet files during an epoch ([`DeltaWriter`]). At the barrier the files are uploaded and their `add`
//! actions go into the manifest. After the manifest is published one [`DeltaCommitter`] per sink commits them with an
//! application transaction (app = pipeline/sink, version = epoch); replaying a commit that landed does nothing.

pub mod append;
pub mod committer;
mod compact;
pub mod config;
pub mod entries;
pub mod history;
pub mod insert;
pub mod ledger;
mod log;
pub mod replace;
mod schema;
pub mod stats;
pub mod store;
pub mod swap;
pub mod table;
pub mod upkeep;
pub mod upsert;
mod vacuum;
pub mod writer;

#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};

pub use committer::{CommitProgress, Committed, DeltaCommitter, TableState};
pub use config::{DeltaConfig, Mode};
pub use upkeep::{Compacted, Upkeep};
pub use writer::DeltaWriter;

/// A file that is uploaded and not yet part of the table.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct PreparedFile {
    /// Relative to the table.
    pub path: String,
    pub size: u64,
    pub rows: u64,
    /// The Delta `add` action.
    pub add: serde_json::Value,
}
