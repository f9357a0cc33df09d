//! Text → statements. Knows nothing of connectors or plans.

pub mod catalog;
pub mod interval;
pub mod options;
pub mod parser;
pub mod place;
pub mod statement;
pub mod types;
pub mod variables;
pub mod windows;

pub use catalog::Catalog;
pub use place::SourceText;
pub use statement::*;
pub use variables::Variables;

#[cfg(test)]
mod tests;
