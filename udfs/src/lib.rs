//! Functions for ML features, for any Apache DataFusion session; Millstream registers them in every room,
//! so that a feature means the same in the stream, in the backfill and at serving time.
//!
//! | function | answer | see |
//! |---|---|---|
//! | `day_of_year(x [, time_zone])` | `INT`, 1 to 366 | [`time`] |
//! | `day_of_week(x [, time_zone])` | `INT`, ISO: Monday = 1 to Sunday = 7 | [`time`] |
//! | `hour_of_day(x [, time_zone])` | `INT`, 0 to 23 | [`time`] |
//! | `zip_lookup(zip, column)` | a fact about a ZIP code, of the column's type | [`zip`] |
//! | `sum(x)`, `avg(x)` of doubles | exact, rounded once, in place of DataFusion's | [`sum`] |
//!
//! Every scalar function is immutable (the same arguments always give the same answer: no clock, no session setting) and
//! strict (a NULL argument gives NULL). The crate does no I/O and depends on DataFusion alone.
//!
//! ```
//! use datafusion::prelude::SessionContext;
//!
//! # #[tokio::main(flavor = "current_thread")]
//! # async fn main() -> datafusion::error::Result<()> {
//! let mut ctx = SessionContext::new();
//! millstream_udfs::register_all(&mut ctx)?;
//!
//! // 2024-04-11 14:10:05 UTC, a Thursday, as epoch milliseconds.
//! let features = ctx
//!     .sql(
//!         "SELECT day_of_year(millis) AS doy, day_of_week(millis) AS dow, hour_of_day(millis) AS utc,
//!                 hour_of_day(millis, 'Europe/Berlin') AS berlin
//!          FROM (VALUES (1712844605951)) AS t (millis)",
//!     )
//!     .await?;
//! datafusion::assert_batches_eq!(
//!     [
//!         "+-----+-----+-----+--------+",
//!         "| doy | dow | utc | berlin |",
//!         "+-----+-----+-----+--------+",
//!         "| 102 | 4   | 14  | 16     |",
//!         "+-----+-----+-----+--------+",
//!     ],
//!     &features.collect().await?
//! );
//! # Ok(())
//! # }
//! ```

pub mod ensure;
pub mod exact;
pub mod hop;
pub mod sum;
pub mod time;
pub mod zip;

use std::sync::Arc;

use datafusion::error::Result;
use datafusion::logical_expr::registry::FunctionRegistry;
use datafusion::logical_expr::{AggregateUDF, ScalarUDF};

/// The version of a function's answers; `None`: not a function of this crate. It rises when the function, or the table
/// that ships with it, gives another answer for the same arguments: state that was built with the old answers is then
/// not what it would be today.
pub fn version(name: &str) -> Option<u32> {
    const VERSIONS: [(&str, u32); 8] = [
        ("day_of_year", 1),
        ("day_of_week", 1),
        ("hour_of_day", 1),
        ("zip_lookup", 1),
        ("hop_starts", 1),
        ("ensure", 1),
        ("sum", 1),
        ("avg", 1),
    ];
    VERSIONS.iter().find(|(known, _)| *known == name).map(|(_, version)| *version)
}

/// Registers every function of this crate, replacing functions of the same name.
///
/// # Errors
/// If the registry is read-only.
pub fn register_all(registry: &mut dyn FunctionRegistry) -> Result<()> {
    for udf in all()? {
        registry.register_udf(udf)?;
    }
    for udaf in aggregates() {
        registry.register_udaf(udaf)?;
    }
    Ok(())
}

/// Every scalar function of this crate, for registries of other kinds (Ballista executors, serialisation codecs).
///
/// # Errors
/// Never for the data that ships with the crate.
pub fn all() -> Result<Vec<Arc<ScalarUDF>>> {
    let mut functions = time::all();
    functions.extend(ensure::all());
    functions.extend(hop::all());
    functions.extend(zip::all()?);
    Ok(functions)
}

/// Every aggregate of this crate, for the same.
#[must_use]
pub fn aggregates() -> Vec<Arc<AggregateUDF>> {
    sum::all()
}

#[cfg(test)]
mod tests {
    #[test]
    fn every_function_has_a_version() {
        for function in super::all().unwrap() {
            assert!(super::version(function.name()).is_some(), "{}", function.name());
        }
        for function in super::aggregates() {
            assert!(super::version(function.name()).is_some(), "{}", function.name());
        }
        assert_eq!(super::version("sqrt"), None);
    }
}
