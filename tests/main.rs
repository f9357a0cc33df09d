//! The one integration binary: layout of the rooms, SQL files, pipelines against real services.

#![allow(clippy::disallowed_methods, reason = "tests read the environment and start processes")]
mod layout;
mod slt;
