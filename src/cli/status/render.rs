//! A status as text, as Markdown and as JSON.

use super::ago;
use super::facts::{Node, Source, Status};
use crate::cli::table::{self, Column, Style};
use crate::cli::view::count as number;
use crate::error::{Error, Result};
use crate::state::accounts::{NodeAccounts, Role};

/// A table of the status: a head, then rows.
struct Section {
    title: &'static str,
    head: &'static [&'static str],
    rows: Vec<Vec<String>>,
}

pub fn json(status: &Status) -> Result<String> {
    let text = serde_json::to_string_pretty(status);
    let text = text.map_err(|error| Error::internal("the status cannot be written").because(error))?;
    Ok(format!("{text}\n"))
}

pub fn table(status: &Status) -> String {
    let mut text = format!("{}\n", head(status));
    for section in sections(status) {
        // Numbers stand at the right; what is a name or a time does not.
        let column = |(at, head): (usize, &&str)| {
            let cell = |row: &Vec<String>| row.get(at).cloned().unwrap_or_default();
            let cells: Vec<String> = section.rows.iter().map(cell).collect();
            let number = |cell: &String| cell.chars().all(|c| c.is_ascii_digit() || matches!(c, ',' | '-'));
            let right = at > 0 && cells.iter().all(number);
            Column::new(*head, right, 0, cells.into_iter().map(|cell| (Style::Plain, cell)).collect())
        };
        let columns = section.head.iter().enumerate().map(column).collect();
        text.push_str(&format!("\n{}\n", section.title));
        for line in table::table(columns, usize::MAX) {
            text.push_str(&format!("  {}\n", line.paint(usize::MAX, false)));
        }
    }
    text
}

pub fn markdown(status: &Status) -> String {
    let cell = |text: &str| text.replace('|', "\\|");
    let mut text = format!("# Pipeline {}\n\n{}\n", status.pipeline, head(status));
    for reason in &status.reasons {
        text.push_str(&format!("\n- **unhealthy:** {}\n", cell(reason)));
    }
    for section in sections(status) {
        let line = |cells: &[String]| format!("| {} |\n", cells.join(" | "));
        let head: Vec<String> = section.head.iter().map(|head| cell(head)).collect();
        text.push_str(&format!("\n## {}\n\n{}", section.title, line(&head)));
        text.push_str(&line(&vec!["---".to_owned(); head.len()]));
        section.rows.iter().for_each(|row| {
            let row: Vec<String> = row.iter().map(|text| cell(text)).collect();
            text.push_str(&line(&row));
        });
    }
    text
}

fn head(status: &Status) -> String {
    let checkpoint = match (status.checkpoint_ms, status.checkpoint_age_ms) {
        (Some(at), Some(age)) => format!("last checkpoint {} ({} ago)", time_ms(at), ago(age)),
        _ => "no checkpoint yet".to_owned(),
    };
    let every = status.interval_ms.map(|ms| format!(", every {} ms", number(ms))).unwrap_or_default();
    format!(
        "pipeline {}, {}: epoch {}, generation {}, parallelism {}, {checkpoint}{every}; {}; state at {}",
        status.pipeline,
        if status.healthy { "healthy" } else { "unhealthy" },
        status.epoch,
        status.generation,
        status.parallelism,
        status.run,
        status.state,
    )
}

fn sections(status: &Status) -> Vec<Section> {
    let mut sections = vec![
        Section {
            title: "Sources",
            head: &[
                "source",
                "read",
                "accepted",
                "late",
                "tombstones",
                "skipped",
                "dead letters",
                "missing offsets",
                "lag",
                "watermark",
            ],
            rows: status.sources.iter().map(source).collect(),
        },
        Section { title: "Partitions", head: PARTITION, rows: partitions(status) },
        Section { title: "Views, before their first window or group", head: VIEW, rows: views(status) },
        Section { title: "Operators", head: OPERATOR, rows: operators(status) },
        Section { title: "Sinks", head: SINK, rows: status.sinks.iter().map(sink).collect() },
    ];
    let kinds = status.dead_letters.iter().flat_map(|(at, kinds)| {
        kinds.iter().map(move |(kind, rows)| vec![at.clone(), kind.clone(), number(*rows)])
    });
    let mut rows: Vec<Vec<String>> = kinds.collect();
    let known: u64 = status.dead_letters.values().flat_map(|kinds| kinds.values()).sum();
    if status.dead_letters_total > known {
        let rest = status.dead_letters_total - known;
        rows.push(vec!["?".to_owned(), "before kinds were counted".to_owned(), number(rest)]);
    }
    sections.push(Section { title: "Dead letters", head: &["at", "kind", "rows"], rows });
    sections.retain(|section| !section.rows.is_empty());
    sections
}

const PARTITION: &[&str] = &["topic", "partition", "next offset", "end", "lag", "watermark"];
const VIEW: &[&str] = &["view", "rows in", "added", "applied", "filtered", "late", "dead letters"];
const OPERATOR: &[&str] = &[
    "operator",
    "rows in",
    "rows out",
    "filtered",
    "added",
    "settled",
    "held",
    "dead letters",
    "files",
    "state rows",
    "state bytes",
    "watermark",
];
const SINK: &[&str] = &[
    "sink",
    "rows in",
    "written",
    "waiting",
    "dead letters",
    "prepared files",
    "prepared rows",
    "files",
    "state rows",
    "state bytes",
];

fn source(source: &Source) -> Vec<String> {
    let a = source.accounts;
    let lag = match (source.lag, &source.lag_unknown) {
        (Some(lag), _) => number(lag.unsigned_abs()),
        (None, Some(why)) => format!("unknown: {why}"),
        (None, None) => "unknown".to_owned(),
    };
    let mut row = vec![source.name.clone()];
    row.extend(
        [a.read, a.accepted, a.late, a.tombstones, a.skipped, a.dead_letters, a.missing_offsets].map(number),
    );
    row.extend([lag, time_us(source.watermark_us)]);
    row
}

fn partitions(status: &Status) -> Vec<Vec<String>> {
    let shown = |number: Option<i64>| number.map_or_else(|| "-".to_owned(), |n| n.to_string());
    let of = status.sources.iter().flat_map(|source| &source.partitions);
    of.map(|p| {
        let (partition, next) = (p.partition.to_string(), p.next_offset.to_string());
        vec![p.topic.clone(), partition, next, shown(p.end), shown(p.lag), time_us(p.watermark_us)]
    })
    .collect()
}

fn views(status: &Status) -> Vec<Vec<String>> {
    let row = |v: &crate::state::accounts::ViewAccounts| {
        let mut row = vec![v.view.clone()];
        row.extend([v.rows_in, v.added, v.applied, v.filtered, v.late, v.dead_letters].map(number));
        row
    };
    status.views.iter().map(row).collect()
}

/// Without projections: nothing happens to the rows there.
fn operators(status: &Status) -> Vec<Vec<String>> {
    let plain = |a: &NodeAccounts| a.role == Role::Stateless && a.filtered + a.added + a.dead_letters == 0;
    let shown = |node: &&Node| !node.accounts.as_ref().is_some_and(plain);
    status.operators.iter().filter(shown).map(operator).collect()
}

fn operator(node: &Node) -> Vec<String> {
    let mut row = vec![node.id.clone()];
    match &node.accounts {
        Some(a) => {
            let out: Vec<String> =
                a.rows_out.iter().map(|(port, rows)| format!("{} {port}", number(*rows))).collect();
            row.extend([number(a.rows_in), out.join(", "), number(a.filtered), number(a.added)]);
            row.extend([a.settled, a.held, a.dead_letters].map(number));
        }
        None => row.extend(vec!["-".to_owned(); 7]),
    }
    row.extend([number(node.files as u64), number(node.file_rows), number(node.file_bytes)]);
    row.push(time_us(node.watermark_us));
    row
}

fn sink(node: &Node) -> Vec<String> {
    let mut row = vec![node.id.clone()];
    match &node.accounts {
        Some(a) => row.extend([a.rows_in, a.written, a.waiting, a.dead_letters].map(number)),
        None => row.extend(vec!["-".to_owned(); 4]),
    }
    let (prepared, files) = (node.prepared_files as u64, node.files as u64);
    row.extend([prepared, node.prepared_rows, files, node.file_rows, node.file_bytes].map(number));
    row
}

pub fn time_ms(ms: i64) -> String {
    let at = chrono::DateTime::from_timestamp_millis(ms);
    at.map_or_else(|| "-".to_owned(), |at| at.format("%FT%T%.3fZ").to_string())
}

fn time_us(us: Option<i64>) -> String {
    us.map_or_else(|| "-".to_owned(), |us| time_ms(us / 1_000))
}
