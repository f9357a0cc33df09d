//! The one integration binary: layout of the rooms, SQL files, pipelines against real services.
#![allow(
    clippy::disallowed_methods,
    reason = "tests read clocks and the environment, and wait for processes"
)]

mod case;
mod faults;
mod layout;
mod online;
mod pipeline;
mod slt;
