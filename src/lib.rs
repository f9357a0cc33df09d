//! Millstream: SQL views over Kafka topics and their backups, materialised to Delta and Redis.
//!
//! Data flows one way, source → operators → sink; control flows cli → sql → plan → runtime | batch. Each module is
//! a room; who may import whom is in the README's code map and enforced by `tests/layout.rs`.

#![cfg_attr(
    test,
    allow(clippy::disallowed_methods, reason = "tests spawn tasks, sleep and read the environment")
)]

pub mod batch;
pub mod cli;
pub mod connectors;
pub mod error;
pub mod operators;
pub mod plan;
pub mod runtime;
pub mod sql;
pub mod state;
pub mod stream;
