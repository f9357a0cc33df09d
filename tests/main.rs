//! The one integration binary: layout of the rooms, SQL files, pipelines against real services.
#![allow(
    clippy::disallowed_methods,
    reason = "tests read clocks and the environment, and wait for processes"
)]

mod layout;
mod pipeline;
mod slt;
