//! YAML text → a tree whose nodes know their place and keep their text.
//!
//! Scalars keep their spelling, so a number reaches the pipeline with the digits that stand in the file. Plain scalars
//! mean what YAML 1.2's core schema says: `null`, `~`, `true`, `false` and numbers; all else is text (`NO` is a string).

use saphyr_parser::{Event, Parser, ScalarStyle, Span};

use crate::error::{Error, Place, Result};
use crate::sql::SourceText;
use crate::sql::options::nearest;

/// How deep lists and maps may nest.
const MAX_DEPTH: usize = 64;
/// Nodes of a file, repeated aliases counted.
const MAX_NODES: usize = 1_000_000;

/// A value with its place.
#[derive(Debug, Clone)]
pub struct Node {
    pub place: Place,
    pub kind: Kind,
    /// Nodes below, itself included.
    size: usize,
}

#[derive(Debug, Clone)]
pub enum Kind {
    /// `plain`: written without quotes, not as a block.
    Scalar {
        text: String,
        plain: bool,
    },
    List(Vec<Node>),
    /// In the order of the file; keys are unique.
    Map(Vec<(Key, Node)>),
}

#[derive(Debug, Clone)]
pub struct Key {
    pub name: String,
    pub place: Place,
}

/// A list or map that is not closed yet.
struct Open {
    place: Place,
    anchor: usize,
    items: Vec<(Option<Key>, Node)>,
    map: bool,
    /// The key whose value comes next.
    key: Option<Key>,
}

/// Reads one document.
///
/// # Errors
/// User, with its place: not YAML, several documents, a key twice or a key that is no text, too deep or too large.
pub fn parse(source: &SourceText) -> Result<Option<Node>> {
    let mut open: Vec<Open> = Vec::new();
    let mut anchors: Vec<(usize, Node)> = Vec::new();
    let (mut root, mut nodes) = (None, 0);
    for event in Parser::new_from_str(&source.text) {
        let (event, span) = event.map_err(|error| {
            let at = error.marker();
            Error::user(format!("this is no YAML: {}", error.info())).at(source.place(
                at.line(),
                at.col() + 1,
                1,
            ))
        })?;
        let place = place_of(source, &span);
        let at = place.clone();
        let wrong = |what: &str| Err(Error::user(what).at(at.clone()));
        let alias = matches!(event, Event::Alias(_));
        let (node, anchor) = match event {
            Event::DocumentStart(_) if root.is_some() => {
                return wrong("a fixture is one YAML document, here begins a second one");
            }
            Event::Scalar(text, style, anchor, _) => {
                let plain = style == ScalarStyle::Plain;
                let kind = Kind::Scalar { text: text.into_owned(), plain };
                (Node { place, kind, size: 1 }, anchor)
            }
            Event::Alias(anchor) => match anchors.iter().rev().find(|(known, _)| *known == anchor) {
                Some((_, node)) => (Node { place, ..node.clone() }, 0),
                None => return wrong("an alias cannot stand within what it names"),
            },
            Event::SequenceStart(anchor, _) | Event::MappingStart(anchor, _) => {
                if open.len() >= MAX_DEPTH {
                    return wrong("the YAML nests too deep");
                }
                let map = matches!(event, Event::MappingStart(..));
                open.push(Open { place, anchor, items: Vec::new(), map, key: None });
                continue;
            }
            Event::SequenceEnd | Event::MappingEnd => match open.pop() {
                Some(done) => {
                    let anchor = done.anchor;
                    (done.close(), anchor)
                }
                None => continue,
            },
            _ => continue,
        };
        nodes += if alias { node.size } else { 1 };
        if nodes > MAX_NODES {
            return wrong("the YAML is too large");
        }
        if anchor > 0 {
            anchors.push((anchor, node.clone()));
        }
        match open.last_mut() {
            Some(parent) => parent.add(node)?,
            None => root = Some(node),
        }
    }
    Ok(root)
}

/// Columns of the parser begin at 0, ours at 1.
fn place_of(source: &SourceText, span: &Span) -> Place {
    let (start, end) = (span.start, span.end);
    let width = if start.line() == end.line() { end.col().saturating_sub(start.col()) } else { 1 };
    source.place(start.line(), start.col() + 1, width)
}

impl Open {
    fn add(&mut self, node: Node) -> Result<()> {
        match (self.map, self.key.take()) {
            (false, _) => self.items.push((None, node)),
            (true, Some(key)) => self.items.push((Some(key), node)),
            (true, None) => {
                let Kind::Scalar { text, .. } = node.kind else {
                    return Err(Error::user("a key is a word or a text").at(node.place));
                };
                let twice =
                    self.items.iter().any(|(key, _)| key.as_ref().is_some_and(|key| key.name == text));
                if twice {
                    return Err(Error::user(format!("the key {text} stands here twice")).at(node.place));
                }
                self.key = Some(Key { name: text, place: node.place });
            }
        }
        Ok(())
    }

    fn close(self) -> Node {
        let size = 1 + self.items.iter().map(|(_, node)| node.size).sum::<usize>();
        let kind = if self.map {
            Kind::Map(self.items.into_iter().filter_map(|(key, node)| Some((key?, node))).collect())
        } else {
            Kind::List(self.items.into_iter().map(|(_, node)| node).collect())
        };
        Node { place: self.place, kind, size }
    }
}

impl Node {
    pub fn wrong(&self, what: impl Into<String>) -> Error {
        Error::user(what).at(self.place.clone())
    }

    /// Nothing is written here, or `null`.
    pub fn is_null(&self) -> bool {
        matches!(&self.kind, Kind::Scalar { text, plain: true } if matches!(text.as_str(), "" | "~" | "null" | "Null" | "NULL"))
    }

    /// # Errors
    /// User: it is no map.
    pub fn map(&self, what: &str) -> Result<&[(Key, Node)]> {
        match &self.kind {
            Kind::Map(entries) => Ok(entries),
            _ => Err(self.wrong(format!("{what} is a map: key: value"))),
        }
    }

    /// # Errors
    /// User: it is no list.
    pub fn list(&self, what: &str) -> Result<&[Node]> {
        match &self.kind {
            Kind::List(items) => Ok(items),
            _ => Err(self.wrong(format!("{what} is a list: a line with - for each"))),
        }
    }

    /// # Errors
    /// User: it is no text or number.
    pub fn text(&self, what: &str) -> Result<&str> {
        match &self.kind {
            Kind::Scalar { text, .. } if !self.is_null() => Ok(text),
            _ => Err(self.wrong(format!("{what} is a text"))),
        }
    }

    /// # Errors
    /// User: it does not read as a `T`; `what` says what is expected.
    pub fn parsed<T: std::str::FromStr>(&self, what: &str) -> Result<T> {
        let Kind::Scalar { text, .. } = &self.kind else {
            return Err(self.wrong(format!("expected {what}")));
        };
        text.parse().map_err(|_| self.wrong(format!("expected {what}, found '{text}'")))
    }

    /// # Errors
    /// User: it is neither `true` nor `false`.
    pub fn flag(&self) -> Result<bool> {
        self.parsed("true or false")
    }

    /// The value as JSON.
    pub fn json(&self) -> String {
        match &self.kind {
            Kind::Scalar { .. } if self.is_null() => "null".to_owned(),
            Kind::Scalar { text, plain: true } => plain_json(text),
            Kind::Scalar { text, plain: false } => quote(text),
            Kind::List(items) => {
                format!("[{}]", items.iter().map(Self::json).collect::<Vec<_>>().join(","))
            }
            Kind::Map(entries) => {
                let entry = |(key, value): &(Key, Self)| format!("{}:{}", quote(&key.name), value.json());
                format!("{{{}}}", entries.iter().map(entry).collect::<Vec<_>>().join(","))
            }
        }
    }
}

pub fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A scalar without quotes. Numbers that JSON spells otherwise become texts that the decoder reads as numbers.
fn plain_json(text: &str) -> String {
    match text {
        "true" | "True" | "TRUE" => return "true".to_owned(),
        "false" | "False" | "FALSE" => return "false".to_owned(),
        ".nan" | ".NaN" | ".NAN" => return quote("NaN"),
        _ => {}
    }
    if let Some(rest) = text.strip_prefix(['+', '-']).or(Some(text))
        && matches!(rest, ".inf" | ".Inf" | ".INF")
    {
        return quote(if text.starts_with('-') { "-inf" } else { "inf" });
    }
    let other = |digits: &str, radix| i128::from_str_radix(digits, radix).ok().map(|n| n.to_string());
    let number = match (text.strip_prefix("0x"), text.strip_prefix("0o")) {
        (Some(digits), _) => other(digits, 16),
        (_, Some(digits)) => other(digits, 8),
        _ => is_json_number(text).then(|| text.to_owned()),
    };
    number.unwrap_or_else(|| quote(text))
}

fn is_json_number(text: &str) -> bool {
    let digits = text.strip_prefix('-').unwrap_or(text);
    digits.starts_with(|first: char| first.is_ascii_digit())
        && serde_json::from_str::<serde_json::Number>(text).is_ok()
}

/// A key that is none of `known`.
pub fn unknown(key: &Key, what: &str, known: &[&str]) -> Error {
    let names: Vec<String> = known.iter().map(|name| (*name).to_owned()).collect();
    let hint = match nearest(&key.name, &names) {
        Some(near) => format!("Did you mean {near}?"),
        None => format!("Known are {}.", names.join(", ")),
    };
    Error::user(format!("{what} has no {}", key.name)).hint(hint).at(key.place.clone())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn json(text: &str) -> String {
        parse(&SourceText::new("f", text)).unwrap().unwrap().json()
    }

    fn fault(text: &str) -> (String, usize, usize) {
        let error = parse(&SourceText::new("f", text)).unwrap_err();
        let place = error.place().unwrap();
        (error.message().to_owned(), place.line, place.column)
    }

    #[test]
    fn values_keep_their_spelling() {
        let text = "{a: 1.10, b: 9007199254740993, c: '1', d: NO, e: ~, f: , g: true, h: 0x1F, i: -.inf, j: .5, k: 01}";
        let wanted = r#"{"a":1.10,"b":9007199254740993,"c":"1","d":"NO","e":null,"f":null,"g":true,"h":31,"i":"-inf","j":".5","k":"01"}"#;
        assert_eq!(json(text), wanted);
        assert_eq!(json("- 2026-01-02T03:04:05Z\n- \"x\\\"y\""), r#"["2026-01-02T03:04:05Z","x\"y"]"#);
        assert_eq!(json("a: &x {n: 1}\nb: [*x, *x]"), r#"{"a":{"n":1},"b":[{"n":1},{"n":1}]}"#);
        assert_eq!(json("a: |\n  x,y\n  1,2\n"), "{\"a\":\"x,y\\n1,2\\n\"}");
        assert!(parse(&SourceText::new("f", "# nothing\n")).unwrap().is_none());
    }

    #[test]
    fn faults_have_a_place() {
        assert_eq!(fault("a: 1\nb: 2\na: 3"), ("the key a stands here twice".to_owned(), 3, 1));
        assert_eq!(fault("a: 1\n---\nb: 2").1, 2);
        assert!(fault("a: [1, 2").0.starts_with("this is no YAML: "));
        assert_eq!(fault("? [1]\n: 2").0, "a key is a word or a text");
        assert_eq!(fault(&"[".repeat(100)).0, "the YAML nests too deep");
        let bomb: String = (1..20).fold("a0: &a0 [x]\n".to_owned(), |text, n| {
            format!("{text}a{n}: &a{n} [{}]\n", vec![format!("*a{}", n - 1); 10].join(","))
        });
        assert_eq!(fault(&bomb).0, "the YAML is too large");
    }
}
