//! Whether the rows of a sink fit into its table, and which columns the table has to get (`on_schema_change`).
//!
//! Files and readers find columns by name, so only names and types have to fit, not places: a table that was given
//! columns has them behind all others. A column that the rows no longer have stays and is NULL from then on. A column
//! whose type changed is always refused: what is stored was written in the old one, and no value may change its meaning.

use std::collections::BTreeMap;

use deltalake_core::kernel::transaction::PROTOCOL;
use deltalake_core::kernel::{StructField, StructType};
use deltalake_core::table::state::DeltaTableState;

use super::config::{DeltaConfig, OnSchemaChange};
use crate::error::{Error, Result};

/// Refuses tables with rules that our files would not keep.
///
/// # Errors
/// User: a feature, constraint or generated column that we do not know.
pub fn check_features(location: &str, state: &DeltaTableState) -> Result<()> {
    let unsupported = |what: String| {
        let hint = "Write to another location, or drop that feature from the table.";
        Error::user(format!("the Delta table {location} has {what}, which a sink cannot keep")).hint(hint)
    };
    PROTOCOL.can_write_to(state).map_err(|error| unsupported("unknown features".into()).because(error))?;
    let kept = |(key, value): &(&String, &String)| {
        key.starts_with("delta.constraints.") || (*key == "delta.columnMapping.mode" && *value != "none")
    };
    if let Some((key, _)) = state.metadata().configuration().iter().find(kept) {
        return Err(unsupported(key.clone()));
    }
    let found = state.schema();
    let rules = ["delta.generationExpression", "delta.invariants", "delta.identity.start"];
    match found.fields().find(|f| rules.iter().any(|rule| f.metadata().contains_key(*rule))) {
        Some(field) => Err(unsupported(format!("a rule on column {}", field.name()))),
        None => Ok(()),
    }
}

/// The columns that the table lacks; none unless they may be added.
///
/// # Errors
/// User: columns or a partitioning that do not fit, with the way out.
pub fn missing_columns(
    config: &DeltaConfig,
    found: &StructType,
    partitions: &[String],
    wanted: &StructType,
) -> Result<Vec<StructField>> {
    let location = &config.location;
    let names = config.partition_names();
    if names != partitions {
        // Said below when it is a matter of columns.
        let columns = columns_differ(config, found, wanted);
        let message = format!(
            "the Delta table {location} is partitioned by [{}], the sink says [{}]",
            partitions.join(", "),
            names.join(", ")
        );
        let hint = "Write to another location, or change the SQL back.";
        return Err(columns.unwrap_or_else(|| Error::user(message).hint(hint)));
    }
    match config.on_schema_change {
        OnSchemaChange::Fail => columns_differ(config, found, wanted).map_or(Ok(Vec::new()), Err),
        OnSchemaChange::AddColumns => added(location, found, wanted),
    }
}

/// What `on_schema_change = 'fail'` says of other columns, or of other places.
fn columns_differ(config: &DeltaConfig, found: &StructType, wanted: &StructType) -> Option<Error> {
    let location = &config.location;
    let describe = |schema: &StructType| -> Vec<String> {
        schema.fields().map(|field| format!("{} {}", field.name(), field.data_type())).collect()
    };
    let (found, wanted) = (describe(found), describe(wanted));
    if found == wanted {
        return None;
    }
    let only = |of: &[String], other: &[String]| {
        of.iter().filter(|c| !other.contains(c)).cloned().collect::<Vec<_>>().join(", ")
    };
    let (missing, extra) = (only(&wanted, &found), only(&found, &wanted));
    let message = match missing.is_empty() && extra.is_empty() {
        true => {
            format!("the Delta table {location} has its columns in another order: {}", found.join(", "))
        }
        false => format!(
            "the Delta table {location} has other columns: the sink writes [{missing}], the table has [{extra}] instead"
        ),
    };
    let hint = "Write to another location, or change the SQL back; with on_schema_change = 'add_columns' the table \
                gets new columns, and keeps those that the SQL no longer has.";
    Some(Error::user(message).hint(hint))
}

fn added(location: &str, found: &StructType, wanted: &StructType) -> Result<Vec<StructField>> {
    // Delta compares names without regard to case.
    let known: BTreeMap<String, &StructField> =
        found.fields().map(|field| (field.name().to_lowercase(), field)).collect();
    let mut added = Vec::new();
    for field in wanted.fields() {
        let Some(there) = known.get(&field.name().to_lowercase()) else {
            added.push(StructField::nullable(field.name(), field.data_type().clone()));
            continue;
        };
        if there.name() != field.name() {
            let message = format!(
                "the Delta table {location} has the column {}, the sink writes {}",
                there.name(),
                field.name()
            );
            let hint = format!("Delta takes them for the same column: write AS {}.", there.name());
            return Err(Error::user(message).hint(hint));
        }
        if there.data_type() != field.data_type() {
            let message = format!(
                "the Delta table {location} has the column {} as {}, the sink writes {}",
                field.name(),
                there.data_type(),
                field.data_type()
            );
            let hint = "Cast it back to the type of the table, give the new column another name with AS, or write to \
                        another location.";
            return Err(Error::user(message).hint(hint));
        }
    }
    let wanted = |field: &&StructField| wanted.field(field.name()).is_some();
    if let Some(field) = found.fields().find(|field| !field.is_nullable() && !wanted(field)) {
        let message = format!(
            "the Delta table {location} has the column {} NOT NULL, which the sink does not write",
            field.name()
        );
        let hint = "Put the column back into the SQL, or write to another location.";
        return Err(Error::user(message).hint(hint));
    }
    Ok(added)
}
