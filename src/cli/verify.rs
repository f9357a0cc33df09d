//! `millstream verify`: a sink against the answer that applies to it. Nothing is claimed or written.

use std::fmt::Write as _;
use std::process::ExitCode;

use arrow::compute::kernels::cast_utils::string_to_timestamp_nanos;
use clap::{Args, ValueEnum};

use super::{Files, StateArgs, environment, load, output};
use crate::batch::verify::compare::{Compared, Difference};
use crate::batch::verify::{Report, Request, shown as time_text, verify};
use crate::error::{Error, Result};
use crate::plan::{SinkKind, StreamPlan};
use crate::sql::{Catalog, SinkInput};
use crate::stream::Micros;

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Format {
    Table,
    Json,
}

#[derive(Debug, Args)]
pub struct VerifyArgs {
    /// The sink: a Delta table, or an online store.
    sink: String,
    #[command(flatten)]
    files: Files,
    #[command(flatten)]
    state: StateArgs,
    /// Only rows with a time from here on: 2026-01-31, or 2026-01-31T12:00:00Z.
    #[arg(long, value_name = "TIME", value_parser = time)]
    from: Option<Micros>,
    /// Only rows with a time before.
    #[arg(long, value_name = "TIME", value_parser = time)]
    to: Option<Micros>,
    /// Only this share of the keys (of the times, without a key), such as 1%; the same rows each time.
    #[arg(long, value_name = "PERCENT", value_parser = percent)]
    sample: Option<f64>,
    /// The online stores of the same view too.
    #[arg(long)]
    online: bool,
    /// Differing rows of each kind that are shown.
    #[arg(long, default_value_t = 5)]
    rows: usize,
    /// Memory beyond which sorts and aggregations spill to temporary files, such as 2GB; default: 70 % of what the
    /// machine or the container allows.
    #[arg(long, value_name = "SIZE", value_parser = super::size)]
    memory: Option<u64>,
    #[arg(long, value_enum, default_value_t = Format::Table)]
    format: Format,
}

fn time(text: &str) -> std::result::Result<Micros, String> {
    let nanos = string_to_timestamp_nanos(text.trim_end_matches(" UTC"));
    nanos
        .map(|nanos| nanos.div_euclid(1_000))
        .map_err(|_| "expected a time such as 2026-01-31T12:00:00Z".to_owned())
}

fn percent(text: &str) -> std::result::Result<f64, String> {
    let share = text.strip_suffix('%').and_then(|number| number.trim().parse::<f64>().ok());
    let share = share.filter(|percent| *percent > 0.0 && *percent <= 100.0);
    share.map(|percent| percent / 100.0).ok_or_else(|| "expected a share such as 1%".to_owned())
}

/// # Errors
/// User: no such sink, the SQL. External: a table or the state cannot be read.
pub async fn run(args: VerifyArgs) -> Result<ExitCode> {
    let catalog = load(&args.files)?;
    let mut plan = crate::plan::sinks::plan(&catalog, &[]).await?;
    plan.resolve_secrets(&environment)?;
    let (name, state) = args.state.target(&args.files)?;
    let mut sinks = vec![args.sink.clone()];
    if args.online {
        sinks.extend(online_beside(&catalog, &plan, &args.sink));
        let online =
            |name: &String| plan.sinks().any(|(_, sink)| sink.name == *name && is_online(&sink.kind));
        if !sinks.iter().any(online) {
            return Err(Error::user(format!("no online sink reads what {} reads", args.sink))
                .hint("Leave --online out, or name the online sink itself."));
        }
    }
    let mut reports = Vec::new();
    for sink in &sinks {
        let request = Request {
            catalog: &catalog,
            plan: &plan,
            name: &name,
            state: &state,
            sink,
            from: args.from,
            to: args.to,
            sample: args.sample,
            shown: args.rows,
            memory: args.memory.or_else(crate::runtime::memory::default_budget),
        };
        reports.push(verify(&request).await?);
    }
    match args.format {
        Format::Json => {
            let text = serde_json::to_string_pretty(&reports)
                .map_err(|error| Error::internal("the report cannot be written").because(error))?;
            output::text(&format!("{text}\n"))?;
        }
        Format::Table => output::text(&reports.iter().map(shown).collect::<String>())?,
    }
    Ok(ExitCode::from(u8::from(!reports.iter().all(|report| report.same))))
}

fn is_online(kind: &SinkKind) -> bool {
    matches!(kind, SinkKind::Online { .. })
}

/// Online sinks of the same relation.
fn online_beside(catalog: &Catalog, plan: &StreamPlan, sink: &str) -> Vec<String> {
    let relation = |name: &str| match catalog.sink(name).map(|sink| &sink.input) {
        Some(SinkInput::Relation { name, .. }) => Some(name.clone()),
        _ => None,
    };
    let of = relation(sink);
    let beside = plan.sinks().filter(|(_, other)| other.name != sink && is_online(&other.kind));
    beside.map(|(_, sink)| sink.name.clone()).filter(|name| of.is_some() && relation(name) == of).collect()
}

fn shown(report: &Report) -> String {
    let mut text = String::new();
    let verdict = if report.same { "the same" } else { "DIFFERENT" };
    let until = report.until.map(|at| format!(", rows before {}", time_text(at)));
    let _ = writeln!(text, "{} ({}): {verdict}{}", report.sink, report.connector, until.unwrap_or_default());
    let _ = writeln!(
        text,
        "  left out: {} late, {} dead letters, {} replayed",
        report.late, report.dead_letters, report.replayed
    );
    if report.backfilled > 0 {
        let _ = writeln!(text, "  backfilled: {} intervals, where late rows count", report.backfilled);
    }
    if let Some(backup) = &report.backup {
        let accepted = backup.accepted.map_or("unknown".to_owned(), |n| n.to_string());
        let _ = writeln!(
            text,
            "  rows {}, accepted {accepted}, missing {}, duplicates {}, beyond the committed offsets {}, offsets without a row {}",
            backup.rows, backup.missing, backup.duplicates, backup.beyond, backup.offsets_without_row
        );
    }
    if let Some(compared) = &report.compared {
        text.push_str(&compared_text(compared));
    }
    if let Some(rows) = report.late_would_change {
        let _ = writeln!(text, "  late rows would change {rows} rows");
    }
    for what in &report.unproven {
        let _ = writeln!(text, "  cannot be proven: {what}");
    }
    text
}

fn compared_text(compared: &Compared) -> String {
    let mut text = String::new();
    let Compared { table_rows, answer_rows, equal, changed, missing, extra, excused, .. } = compared;
    let _ = writeln!(
        text,
        "  rows {table_rows}, answer {answer_rows}: {equal} equal, {changed} changed, {missing} missing, {extra} extra, {excused} expired or newer"
    );
    if compared.truncated {
        text.push_str("  more rows differ than are looked at; what follows is of a part of them\n");
    }
    let width = compared.columns.iter().map(|column| column.name.len()).max().unwrap_or(0).max(6);
    let _ = writeln!(
        text,
        "  {:width$}  {:>9}  {:>9}  {:>9}  {:>14}",
        "column", "exact %", "nulls", "SMAPE %", "max difference"
    );
    for column in &compared.columns {
        let number = |n: Option<f64>, digits: usize| n.map_or("-".to_owned(), |n| format!("{n:.digits$}"));
        let _ = writeln!(
            text,
            "  {:width$}  {:>9.4}  {:>9}  {:>9}  {:>14}",
            column.name,
            column.exact_percent,
            column.null_mismatches,
            number(column.smape_percent, 6),
            column.max_difference.map_or("-".to_owned(), |n| n.to_string())
        );
    }
    compared.first.iter().for_each(|difference| text.push_str(&difference_text(difference)));
    text
}

fn difference_text(difference: &Difference) -> String {
    let row: Vec<String> = difference.row.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let mut text = format!("  {}: {}\n", difference.kind, row.join(" "));
    for (name, table, answer) in &difference.differs {
        let _ = writeln!(text, "    {name}: table {table}, answer {answer}");
    }
    text
}
