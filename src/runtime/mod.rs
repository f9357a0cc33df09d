//! Tasks over bounded channels, barriers, coordinator (DESIGN §5).
//!
//! Only this room spawns tasks. Per shard: a source thread, a task per OVER, a task per sink; between them bounded
//! channels. The coordinator cuts the stream into epochs by barriers and publishes a manifest for each.

mod again;
mod aside;
mod building;
pub mod chain;
pub mod changes;
mod compaction;
pub mod coordinator;
mod counts;
mod discovery;
mod flushed;
pub mod freshness;
mod gather;
mod graph;
mod grouped;
#[cfg(feature = "delta")]
mod history;
#[cfg(not(feature = "delta"))]
#[path = "no_history.rs"]
mod history;
pub mod inbox;
mod keyed;
pub mod lag;
mod letters;
mod lookups;
pub mod memory;
pub mod metrics;
mod online;
mod outage;
#[cfg(feature = "delta")]
mod remake;
#[cfg(feature = "redis")]
mod remote;
pub mod report;
mod silence;
mod sinks;
mod source;
mod stage;
mod staged;
#[cfg(feature = "delta")]
mod stand_ins;
mod standstill;
mod start;
#[cfg(feature = "delta")]
mod tables;
#[cfg(not(feature = "delta"))]
#[path = "no_tables.rs"]
mod tables;
#[cfg(feature = "delta")]
mod upkeep;
#[cfg(feature = "delta")]
mod upsert;
pub mod watermark;

pub use coordinator::{Outcome, RunOptions, run};
pub use metrics::Metrics;
pub use start::stored_positions;
