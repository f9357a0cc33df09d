//! No two sinks of a pipeline write to one place: each takes it for its own. Files of the other's would be cleaned up as
//! left behind, a table rebuilt or backfilled with the other's rows in it, and keys of one Redis overwritten in turn.

use std::collections::BTreeMap;

use crate::connectors::files::same_place;
use crate::error::{Error, Place, Result};
#[cfg(feature = "redis")]
use crate::plan::OnlineKind;
use crate::plan::{SinkKind, SinkPlan, StreamPlan};
use crate::sql::{Catalog, CreateSink};

/// What a sink writes to, in words that are the same for the same place, and the option that says so.
fn target(sink: &SinkPlan) -> Option<(String, &'static str)> {
    match &sink.kind {
        #[cfg(feature = "delta")]
        SinkKind::Delta(config) => Some((same_place(&config.location), "location")),
        SinkKind::Ndjson(config) => Some((same_place(&config.location), "location")),
        #[cfg(feature = "redis")]
        SinkKind::Online { store: OnlineKind::Redis(config), .. } => Some((config.place()?, "prefix")),
        _ => None,
    }
}

/// # Errors
/// User: two sinks have one place; both of their places in the SQL are named.
pub fn check(plan: &StreamPlan, catalog: &Catalog) -> Result<()> {
    let mut taken: BTreeMap<String, (&CreateSink, Place)> = BTreeMap::new();
    for (_, sink) in plan.sinks() {
        let (Some((target, option)), Some(declared)) = (target(sink), catalog.sink(&sink.name)) else {
            continue;
        };
        let place = declared.options.place(option).unwrap_or_else(|| declared.place.clone());
        if let Some((first, at)) = taken.get(&target) {
            let (name, other) = (&sink.name, &first.name);
            let shown = match option {
                "location" => format!("the location of sink {other}"),
                _ => format!("the keys of sink {other}"),
            };
            let message = format!("sink {name} writes to {shown} ({}:{})", at.file, at.line);
            return Err(Error::user(message)
                .hint(format!("Give each sink a {option} of its own."))
                .at(place));
        }
        taken.insert(target, (declared, place));
    }
    Ok(())
}
