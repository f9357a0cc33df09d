//! Tasks over bounded channels, barriers, coordinator.

pub mod inbox;
pub mod watermark;
