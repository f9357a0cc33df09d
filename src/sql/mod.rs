//! Text → statements. Knows nothing of connectors or plans.
//!
//! The way of a text: [`variables`] puts values in place of `${VAR}` and keeps a map back to what the user wrote;
//! the tokens of the result carry places of the *original* text from then on, so every later error, DataFusion's
//! own included, points there. [`parser::parse`] cuts the tokens at `;` and makes one [`Statement`] of each: ours by our
//! own grammar, every other by DataFusion's parser. [`windows`] writes named windows out in full, [`window_tables`] TUMBLE and HOP as
//! plain SQL, [`as_of`] moves FOR SYSTEM_TIME AS OF into the condition of its JOIN. [`Catalog`] gathers the statements of all files; they may refer forward, and across files.
//!
//! Unquoted names are lowercased, quoted ones kept, as DataFusion does.

pub mod as_of;
pub mod calendar;
pub mod catalog;
mod create;
mod create_schedule;
pub mod cron;
pub mod interval;
pub mod options;
pub mod parser;
pub mod place;
mod rewrite;
pub mod statement;
pub mod types;
pub mod variables;
pub mod versions;
pub mod wildcard;
pub mod window_tables;
pub mod windows;

pub use catalog::Catalog;
pub use place::SourceText;
pub use statement::*;
pub use variables::Variables;

#[cfg(test)]
mod tests;
