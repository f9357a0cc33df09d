//! Which sinks whose SQL changed can be rebuilt in their place (DESIGN §6): by their [fingerprints](super::fingerprint).
//!
//! The rebuilt rows come of exactly the records that the pipeline has read, with its decisions on which were late. So the
//! query may change, but not the source's topic, event time or lateness; and the sink stays what and where it is, as its
//! readers know it.

use std::collections::BTreeSet;

use super::fingerprint::FORMAT;
use crate::plan::{NodeId, NodeKind, SinkKind, StreamPlan};

impl StreamPlan {
    /// Why a sink that meant `known` cannot be rebuilt in its place; `None`: it can.
    pub fn stays_put(&self, id: NodeId, known: &str) -> Option<String> {
        let NodeKind::Sink(sink) = &self.nodes[id].kind else { return Some("it is no sink".to_owned()) };
        let now = self.fingerprint(id);
        if !known.starts_with(FORMAT) {
            return Some("its state was written by an older version of Millstream".to_owned());
        }
        let line = |text: &str| text.lines().nth(1).unwrap_or_default().to_owned();
        let (was, is) = (line(known), line(&now));
        if was != is {
            return Some(format!("the sink itself is another: it was '{was}', it is '{is}'"));
        }
        if sources(known) != sources(&now) {
            return Some("its source is another, or decides otherwise which rows are late".to_owned());
        }
        match &sink.kind {
            #[cfg(feature = "delta")]
            SinkKind::Delta(_) => None,
            SinkKind::Online { .. } => {
                let (was, is) = (columns(known), columns(&now));
                let name = |column: &str| column.split(' ').next().unwrap_or_default().to_owned();
                let gone = was.iter().find(|was| !is.iter().any(|is| name(is) == name(was)));
                let is_key = |column: &&String| {
                    sink.key.iter().any(|key| *sink.schema.field(*key).name() == name(column))
                };
                let key = was.iter().filter(is_key).find(|column| !is.contains(column));
                match (gone, key) {
                    (Some(gone), _) => {
                        Some(format!("rows that are served have the column {}, which it lost", name(gone)))
                    }
                    (None, Some(key)) => Some(format!("its key column {} has another type", name(key))),
                    (None, None) => None,
                }
            }
            other => Some(format!(
                "what a sink with connector = '{}' wrote cannot be taken back",
                other.connector()
            )),
        }
    }
}

/// The columns of a sink, with their types.
fn columns(fingerprint: &str) -> Vec<String> {
    let lines = fingerprint.lines().skip(2).take_while(|line| line.starts_with("  "));
    lines.map(|line| line.trim_start().trim_end_matches(" NOT NULL").to_owned()).collect()
}

/// What decides which rows a fingerprint's sources have: their names and topics, event times and lateness.
fn sources(fingerprint: &str) -> BTreeSet<Vec<&str>> {
    let depth = |line: &str| line.len() - line.trim_start().len();
    let lines: Vec<&str> = fingerprint.lines().collect();
    let mut found = BTreeSet::new();
    // `source t: kafka topic y`; a column may be called source.
    let is_source =
        |line: &str| line.trim_start().strip_prefix("source ").is_some_and(|rest| rest.contains(": "));
    for (at, line) in lines.iter().enumerate().filter(|(_, line)| is_source(line)) {
        let inside = lines[at + 1..].iter().take_while(|other| depth(other) > depth(line));
        let inside: Vec<&str> = inside.map(|line| line.trim_start()).collect();
        let timed = inside.iter().find_map(|line| line.strip_prefix("watermark ")?.split(' ').next());
        let decides = |line: &&&str| {
            ["watermark ", "max_future "].iter().any(|word| line.starts_with(word))
                || timed.is_some_and(|time| line.split(' ').next() == Some(time))
        };
        let mut source = vec![line.trim_start()];
        source.extend(inside.iter().filter(decides));
        found.insert(source);
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "fingerprint 2\nsink s: delta x\n  id Int64\n  b Utf8\nof accepted rows\nb = concat(a)\nfilter a = 1\n\
                        source t: kafka topic y\n  a Utf8\n  at Int64\n  when Timestamp\n  when = to_timestamp(at)\n  \
                        watermark when - 1 s\n  max_future 1 h\nfunction concat 1";

    #[test]
    fn sources_are_the_same_whatever_is_read_of_them() {
        let expected = vec![
            "source t: kafka topic y",
            "when Timestamp",
            "when = to_timestamp(at)",
            "watermark when - 1 s",
            "max_future 1 h",
        ];
        assert_eq!(sources(TEXT), [expected].into());
        assert_eq!(columns(TEXT), ["id Int64", "b Utf8"]);
        let same = TEXT.replace("  a Utf8\n", "  c Float64\n").replace("filter a = 1\n", "");
        assert_eq!(sources(TEXT), sources(&same));
        for (was, is) in
            [("- 1 s", "- 2 s"), ("topic y", "topic z"), ("to_timestamp(at)", "now()"), ("1 h", "2 h")]
        {
            assert_ne!(sources(TEXT), sources(&TEXT.replace(was, is)), "{was}");
        }
    }
}
