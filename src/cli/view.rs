//! What the live view shows, as lines: a pure function of a [`Snapshot`] and the size of the terminal.

use std::time::Duration;

use unicode_width::UnicodeWidthStr;

use crate::cli::table::{Column, Line, Style, table};
use crate::runtime::metrics::Letters;

/// Above this width the view has room for what is nice to have.
const WIDE: usize = 110;
/// A table of rows with fewer lines than this (title, head, row) is not begun.
const LEAST_ROWS: usize = 3;
const SPARKS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// What is known of a pipeline at a moment.
#[derive(Debug, Clone, Default)]
pub struct Snapshot {
    /// `dev transactions-dev`.
    pub title: String,
    pub uptime: Duration,
    pub epoch: u64,
    /// Age of the newest checkpoint.
    pub checkpoint: Option<Duration>,
    pub stopping: bool,
    pub sources: Vec<Source>,
    pub letters: Letters,
    pub sinks: Vec<Sink>,
    /// What waits, and for what.
    pub pressure: Vec<String>,
    pub samples: Vec<Sample>,
}

#[derive(Debug, Clone, Default)]
pub struct Source {
    pub name: String,
    pub origin: String,
    pub rate: f64,
    /// Rates of the last seconds, oldest first.
    pub rates: Vec<f64>,
    pub read: u64,
    pub lag: i64,
    pub late: u64,
    /// ms since the epoch.
    pub watermark: Option<i64>,
    /// How far the watermark is behind the clock.
    pub behind: Option<Duration>,
    /// Why the watermark is where it is.
    pub holding: Option<String>,
}

#[derive(Debug, Clone, Default)]
pub struct Sink {
    pub name: String,
    pub target: String,
    pub rate: f64,
    pub rows: u64,
    pub commits: u64,
    /// Version of the table.
    pub version: Option<u64>,
    /// Age of the newest commit.
    pub newest: Option<Duration>,
    /// From reading a record to the store's acknowledgement, of the last seconds, in µs.
    pub from_read: Option<u64>,
    /// From event time to the store's acknowledgement, in µs; where event times are real.
    pub from_event: Option<u64>,
    /// Keys that wait for a store that does not answer.
    pub waiting: Option<u64>,
}

/// Newest rows of an online sink.
#[derive(Debug, Clone, Default)]
pub struct Sample {
    pub sink: String,
    pub columns: Vec<(String, bool)>,
    /// Newest first.
    pub rows: Vec<Vec<String>>,
}

/// As many lines as fit; the rows of samples get what the rest leaves.
pub fn render(snapshot: &Snapshot, width: usize, height: usize) -> Vec<Line> {
    let mut lines = vec![head(snapshot, width)];
    let roomy = height >= 16;
    let blank = |lines: &mut Vec<Line>| {
        if roomy {
            lines.push(Line::default());
        }
    };
    blank(&mut lines);
    lines.extend(sources(snapshot, width));
    lines.extend(letters(&snapshot.letters));
    blank(&mut lines);
    lines.extend(sinks(snapshot, width));
    lines.extend(snapshot.pressure.iter().map(|line| Line::new(Style::Dim, line.clone())));
    let shown: Vec<&Sample> = snapshot.samples.iter().filter(|sample| !sample.rows.is_empty()).collect();
    for (at, sample) in shown.iter().enumerate() {
        let left = height.saturating_sub(lines.len());
        let share = left / (shown.len() - at);
        let gap = usize::from(roomy);
        if share >= LEAST_ROWS + gap {
            blank(&mut lines);
            lines.extend(rows(sample, width, share - gap - 2));
        }
    }
    if lines.len() > height {
        let hidden = lines.len() + 1 - height.max(1);
        lines.truncate(height.saturating_sub(1));
        lines.push(Line::new(Style::Dim, format!("{hidden} more lines: the terminal is too low")));
    }
    lines
}

fn head(snapshot: &Snapshot, width: usize) -> Line {
    let checkpoint = match snapshot.checkpoint {
        Some(age) => format!("checkpoint {}, {} ago", count(snapshot.epoch), ago(age)),
        None => "no checkpoint yet".to_owned(),
    };
    let (style, end) = match snapshot.stopping {
        true => (Style::Bad, "stopping: last checkpoint; Ctrl-C once more: at once"),
        false => (Style::Dim, "Ctrl-C stops"),
    };
    let title = format!("millstream {}", snapshot.title);
    let uptime = format!("   up {}", ago(snapshot.uptime));
    let checkpoint = format!("   {checkpoint}");
    // The uptime gives way first.
    let tight = title.width() + uptime.width() + checkpoint.width() + end.width() >= width;
    let line = Line::new(Style::Bold, title)
        .and(Style::Plain, if tight { String::new() } else { uptime })
        .and(Style::Plain, checkpoint);
    let space = width.saturating_sub(line.width() + end.width()).max(1);
    line.and(Style::Plain, " ".repeat(space)).and(style, end)
}

fn plain(text: impl Into<String>) -> (Style, String) {
    (Style::Plain, text.into())
}

fn marked(bad: bool, text: impl Into<String>) -> (Style, String) {
    (if bad { Style::Bad } else { Style::Plain }, text.into())
}

fn sources(snapshot: &Snapshot, width: usize) -> Vec<Line> {
    let all = &snapshot.sources;
    let watermark = |source: &Source| match (source.watermark, source.behind) {
        (Some(ms), Some(behind)) => format!("{}, {} ago", time(ms), ago(behind)),
        (Some(ms), None) => time(ms),
        _ => "-".to_owned(),
    };
    let cells = |of: &dyn Fn(&Source) -> (Style, String)| all.iter().map(of).collect::<Vec<_>>();
    let mut columns = vec![
        Column::new("source", false, 0, cells(&|s| (Style::Bold, s.name.clone()))),
        Column::new("rows/s", true, 0, cells(&|s| (Style::Good, count(s.rate.round() as u64)))),
        Column::new("read", true, 1, cells(&|s| plain(count(s.read)))),
        Column::new("lag", true, 0, cells(&|s| plain(count(s.lag.max(0).unsigned_abs())))),
        Column::new("late", true, 0, cells(&|s| marked(s.late > 0, count(s.late)))),
        Column::new("watermark", false, 0, cells(&|s| plain(watermark(s)))),
    ];
    if width >= WIDE {
        columns.insert(1, Column::new("from", false, 2, cells(&|s| plain(s.origin.clone()))));
        columns.push(Column::new("last 20 s", false, 3, cells(&|s| (Style::Good, sparks(&s.rates)))));
    }
    let mut lines = Vec::new();
    for (at, line) in table(columns, width).into_iter().enumerate() {
        lines.push(line);
        let holding = at.checked_sub(1).and_then(|row| all.get(row)?.holding.clone());
        lines.extend(holding.map(|why| Line::new(Style::Dim, format!("  {why}"))));
    }
    lines
}

fn letters(letters: &Letters) -> Vec<Line> {
    let total = format!("dead letters {}", count(letters.total));
    let Some((place, error)) = &letters.newest else { return vec![Line::new(Style::Dim, total)] };
    let kinds: Vec<String> =
        letters.kinds.iter().map(|(kind, number)| format!("{} {kind}", count(*number))).collect();
    vec![
        Line::new(Style::Bad, total).and(Style::Plain, format!(": {}", kinds.join(", "))),
        Line::new(Style::Dim, format!("  newest {place}: {error}")),
    ]
}

fn sinks(snapshot: &Snapshot, width: usize) -> Vec<Line> {
    let all = &snapshot.sinks;
    let cells = |of: &dyn Fn(&Sink) -> (Style, String)| all.iter().map(of).collect::<Vec<_>>();
    let newest = |sink: &Sink| match (sink.waiting, sink.newest, sink.version) {
        (Some(keys), _, _) => (Style::Bad, format!("down, {} keys wait", count(keys))),
        (None, Some(age), Some(version)) => plain(format!("{} ago, v{version}", ago(age))),
        (None, Some(age), None) => plain(format!("{} ago", ago(age))),
        (None, None, _) => plain("-"),
    };
    let took = |micros: Option<u64>| plain(micros.map_or_else(|| "-".to_owned(), latency));
    let mut columns = vec![
        Column::new("sink", false, 0, cells(&|s| (Style::Bold, s.name.clone()))),
        Column::new("into", false, 2, cells(&|s| plain(s.target.clone()))),
        Column::new("rows/s", true, 3, cells(&|s| (Style::Good, count(s.rate.round() as u64)))),
        Column::new("rows", true, 0, cells(&|s| plain(count(s.rows)))),
        Column::new("commits", true, 1, cells(&|s| plain(count(s.commits)))),
        Column::new("newest", false, 0, cells(&newest)),
    ];
    if all.iter().any(|sink| sink.from_read.is_some()) {
        columns.push(Column::new("p99 fresh", true, 0, cells(&|s| took(s.from_read))));
    }
    if all.iter().any(|sink| sink.from_event.is_some()) {
        columns.push(Column::new("p99 of event", true, 1, cells(&|s| took(s.from_event))));
    }
    table(columns, width)
}

fn rows(sample: &Sample, width: usize, most: usize) -> Vec<Line> {
    let column = |(at, (name, right)): (usize, &(String, bool))| {
        let cells = sample.rows.iter().take(most).map(|row| plain(row.get(at).cloned().unwrap_or_default()));
        let rank = u8::try_from(at).unwrap_or(u8::MAX);
        Column::new(name.clone(), *right, rank, cells.collect()).cut_head()
    };
    let columns = sample.columns.iter().enumerate().map(column).collect();
    let title = Line::new(Style::Bold, format!("newest in {}", sample.sink));
    std::iter::once(title).chain(table(columns, width)).collect()
}

fn sparks(rates: &[f64]) -> String {
    let most = rates.iter().copied().fold(1.0, f64::max);
    let spark = |rate: &f64| {
        let step = (rate / most * 7.0).round().clamp(0.0, 7.0) as usize;
        SPARKS[step]
    };
    rates.iter().map(spark).collect()
}

/// A count with separators, from ten millions on shortened.
pub fn count(number: u64) -> String {
    if number >= 10_000_000 {
        let (unit, name) = if number >= 10_000_000_000 { (1e9, "G") } else { (1e6, "M") };
        return format!("{:.1}{name}", number as f64 / unit);
    }
    let digits = number.to_string();
    let mut text = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// An age or a duration, as precise as the eye needs.
pub fn ago(age: Duration) -> String {
    let seconds = age.as_secs();
    match seconds {
        0..10 => format!("{:.1} s", age.as_secs_f64()),
        10..120 => format!("{seconds} s"),
        120..7_200 => format!("{} min", seconds / 60),
        7_200..172_800 => format!("{} h", seconds / 3_600),
        _ => format!("{} days", seconds / 86_400),
    }
}

/// A short duration, as precise as the eye needs.
pub fn latency(micros: u64) -> String {
    match micros {
        0..10_000 => format!("{:.1} ms", micros as f64 / 1e3),
        10_000..10_000_000 => format!("{} ms", micros / 1_000),
        _ => ago(Duration::from_micros(micros)),
    }
}

/// A time of day in UTC, with milliseconds.
fn time(ms: i64) -> String {
    chrono::DateTime::from_timestamp_millis(ms)
        .map_or_else(|| "-".to_owned(), |at| at.format("%F %T%.3fZ").to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn snapshot() -> Snapshot {
        let source = Source {
            name: "transactions".to_owned(),
            origin: "kafka topic transactions".to_owned(),
            rate: 2_003.4,
            rates: vec![0.0, 1_000.0, 2_000.0],
            read: 166_249,
            lag: 12,
            late: 0,
            watermark: Some(1_795_232_621_482),
            behind: Some(Duration::from_millis(64_200)),
            holding: Some("partition 2 holds it back".to_owned()),
        };
        let table = Sink {
            name: "user_features_training".to_owned(),
            target: "delta".to_owned(),
            rate: 2_003.0,
            rows: 150_113,
            commits: 83,
            version: Some(84),
            newest: Some(Duration::from_millis(400)),
            ..Sink::default()
        };
        let online = Sink {
            name: "user_features_serving".to_owned(),
            target: "memory".to_owned(),
            rate: 1_503.0,
            rows: 12_345_678,
            commits: 9_999,
            newest: Some(Duration::from_millis(12)),
            from_read: Some(3_100),
            ..Sink::default()
        };
        let row = |id: usize| vec![id.to_string(), "2026-11-21 08:22:11.482".to_owned(), "12".to_owned()];
        let columns = [("user_id", true), ("event_time", false), ("total_transactions_count", true)];
        Snapshot {
            title: "dev transactions-dev".to_owned(),
            uptime: Duration::from_secs(83),
            epoch: 83,
            checkpoint: Some(Duration::from_millis(400)),
            sources: vec![source],
            letters: Letters::default(),
            sinks: vec![table, online],
            pressure: Vec::new(),
            samples: vec![Sample {
                sink: "user_features_serving".to_owned(),
                columns: columns.map(|(name, right)| (name.to_owned(), right)).into(),
                rows: (1..40).map(row).collect(),
            }],
            ..Snapshot::default()
        }
    }

    fn shown(snapshot: &Snapshot, width: usize, height: usize) -> String {
        let lines = render(snapshot, width, height);
        assert!(lines.len() <= height, "{} lines", lines.len());
        lines.iter().map(|line| line.paint(width, false) + "\n").collect()
    }

    #[test]
    fn everything_is_on_a_small_terminal() {
        let expected = "\
millstream dev transactions-dev   checkpoint 83, 0.4 s ago         Ctrl-C stops

source        rows/s     read  lag  late  watermark
transactions   2,003  166,249   12     0  2026-11-21 03:43:41.482Z, 64 s ago
  partition 2 holds it back
dead letters 0

sink                    into       rows  commits  newest          p99 fresh
user_features_training  delta   150,113       83  0.4 s ago, v84          -
user_features_serving   memory    12.3M    9,999  0.0 s ago          3.1 ms

newest in user_features_serving
user_id  event_time               total_transactions_count
      1  2026-11-21 08:22:11.482                        12
      2  2026-11-21 08:22:11.482                        12
      3  2026-11-21 08:22:11.482                        12
";
        let text = shown(&snapshot(), 79, 16);
        assert_eq!(text, expected, "{text}");
        assert_eq!(shown(&snapshot(), 79, 23).lines().count(), 23);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let mut snapshot = snapshot();
        snapshot.stopping = true;
        snapshot.letters = Letters {
            total: 3,
            kinds: [("not_json", 2), ("future", 1)].into(),
            newest: Some(("transactions[1]@7".to_owned(), "not a JSON object".to_owned())),
        };
        snapshot.sinks[1].waiting = Some(1_234);
        let text = shown(&snapshot, 120, 39);
        for word in [
            "stopping: last checkpoint",
            "dead letters 3: 1 future, 2 not_json",
            "newest transactions[1]@7: not a JSON object",
            "down, 1,234 keys wait",
            "▁▅█",
        ] {
            assert!(text.contains(word), "{word} in\n{text}");
        }
    }

    #[test]
    fn any_size_is_kept() {
        for width in [0, 1, 10, 40, 79, 80, 200] {
            for height in [0, 1, 2, 5, 12, 24, 60] {
                let lines = render(&snapshot(), width, height);
                assert!(lines.len() <= height.max(1), "{width}x{height}: {}", lines.len());
            }
        }
        assert!(shown(&snapshot(), 80, 6).contains("the terminal is too low"));
    }

    #[test]
    fn numbers_are_for_the_eye() {
        assert_eq!([0, 999, 1_000, 1_234_567].map(count), ["0", "999", "1,000", "1,234,567"]);
        assert_eq!(count(12_345_678_901), "12.3G");
        assert_eq!(
            [400, 59_000, 3_600_000].map(|ms| ago(Duration::from_millis(ms))),
            ["0.4 s", "59 s", "60 min"]
        );
        assert_eq!([1_234, 45_678, 12_000_000].map(latency), ["1.2 ms", "45 ms", "12 s"]);
    }
}
