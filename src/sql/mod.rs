//! Text → statements. Knows nothing of connectors or plans.

pub mod options;
