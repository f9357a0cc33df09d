//! The one integration binary: layout of the rooms, SQL files, pipelines against real services.
#![allow(
    clippy::disallowed_methods,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "tests read clocks and the environment, wait for processes, say what they skip, and fail by panic"
)]

mod access;
mod adhoc;
mod asof;
mod backfill;
mod bootstrap;
mod brokers;
mod building;
mod case;
mod changed;
mod closing;
mod compaction;
mod crash;
mod delta;
mod dev;
mod disk;
mod faults;
mod fixtures;
mod foreign;
mod groups;
mod layout;
mod letters;
mod lookups;
mod lost;
mod memory;
mod online;
mod options;
mod pipeline;
mod queries;
mod random;
mod readme;
mod rebuilt;
mod redis_cluster;
mod redis_faults;
mod sandbox;
mod schedules;
mod secured;
mod shipped;
mod slt;
mod snapshots;
mod state_format;
mod statements;
mod status;
mod verify;
mod windows;
mod zombie;
