//! What Tab completes: names of tables and columns, keywords, paths in quotes, the shell's own commands.

use std::collections::BTreeMap;

use super::text::{from_code, is_command, open_quote};

const KEYWORDS: &str = "SELECT FROM WHERE GROUP BY HAVING ORDER LIMIT OFFSET DISTINCT AS ON USING JOIN LEFT RIGHT FULL INNER \
OUTER CROSS UNION ALL EXCEPT INTERSECT WITH CASE WHEN THEN ELSE END AND OR NOT IN IS NULL LIKE ILIKE BETWEEN EXISTS CAST ASC \
DESC NULLS FIRST LAST OVER PARTITION RANGE ROWS PRECEDING FOLLOWING UNBOUNDED CURRENT ROW WINDOW FILTER INTERVAL DATE \
TIMESTAMP VALUES EXPLAIN ANALYZE VERBOSE PIPELINE SHOW SOURCES TABLES VIEWS SINKS SCHEDULES DESCRIBE COPY TO VERSION OF FOR \
SYSTEM_TIME TUMBLE HOP UNNEST COUNT SUM AVG MIN MAX COALESCE TRUE FALSE BIGINT DOUBLE VARCHAR BOOLEAN SET";

pub const COMMANDS: [&str; 9] = ["\\d", "\\timing", "\\o", "\\?", "\\q", ".mode", ".limit", ".help", ".quit"];
pub const MODES: [&str; 4] = ["table", "csv", "json", "ndjson"];

/// Names of the pipeline.
#[derive(Debug, Default)]
pub struct Words {
    /// Columns of every relation.
    pub relations: BTreeMap<String, Vec<String>>,
}

/// What may stand from `start` to the cursor.
#[derive(Debug, PartialEq, Eq)]
pub struct Offer {
    pub start: usize,
    pub words: Vec<String>,
}

impl Words {
    /// For a cursor at the end of `before`; `after` is what stands behind it.
    pub fn offer(&self, before: &str, after: &str) -> Offer {
        if let Some(('\'', at)) = open_quote(before) {
            let start = at + 1;
            return Offer { start, words: paths(&before[start..]) };
        }
        let code = from_code(before);
        if is_command(code) {
            return self.of_command(before, code);
        }
        let start = before
            .rfind(|c: char| !is_letter(c) && c != '.')
            .map_or(0, |at| at + before[at..].chars().next().map_or(1, char::len_utf8));
        let word = &before[start..];
        if let Some((of, column)) = word.rsplit_once('.') {
            let columns = self.of_alias(of, &format!("{before}{after}"));
            return Offer { start: start + of.len() + 1, words: matching(columns, column) };
        }
        let previous = before[..start].trim_end().rsplit(|c: char| !is_letter(c)).next().unwrap_or_default();
        let wants_table = ["FROM", "JOIN", "DESCRIBE", "DESC", "UPDATE", "INTO"].iter().any(|keyword| {
            previous.eq_ignore_ascii_case(keyword) && before[..start].trim_end().ends_with(previous)
        });
        if wants_table {
            return Offer { start, words: matching(self.relations.keys(), word) };
        }
        let mut words = matching(self.columns_in(&format!("{before} {after}")), word);
        if !word.is_empty() {
            words.extend(matching(self.relations.keys(), word));
            let upper = word.chars().all(|c| !c.is_lowercase());
            let keywords = KEYWORDS.split_whitespace().filter(|keyword| begins(keyword, word));
            words.extend(keywords.map(|k| if upper { k.to_owned() } else { k.to_lowercase() }));
        }
        words.dedup();
        Offer { start, words }
    }

    fn of_command(&self, before: &str, code: &str) -> Offer {
        let begin = before.len() - code.len();
        let Some(blank) = code.find(char::is_whitespace) else {
            let words = COMMANDS.iter().filter(|name| name.starts_with(code));
            return Offer { start: begin, words: words.map(|name| (*name).to_owned()).collect() };
        };
        let argument = code[blank..].trim_start();
        let words = match &code[..blank] {
            "\\d" => matching(self.relations.keys(), argument),
            "\\o" => paths(argument),
            ".mode" => matching(MODES, argument),
            _ => Vec::new(),
        };
        Offer { start: before.len() - argument.len(), words }
    }

    /// Columns of the relations that a text names; of all, if it names none.
    fn columns_in(&self, text: &str) -> Vec<&String> {
        let named =
            |name: &String| text.split(|c: char| !is_letter(c)).any(|word| word.eq_ignore_ascii_case(name));
        let of = |only: bool| {
            let relations = self.relations.iter().filter(move |(name, _)| !only || named(name));
            let mut columns: Vec<&String> = relations.flat_map(|(_, columns)| columns).collect();
            columns.sort_unstable();
            columns.dedup();
            columns
        };
        let columns = of(true);
        if columns.is_empty() { of(false) } else { columns }
    }

    /// Columns of a relation, by its name or its alias in the text.
    fn of_alias(&self, name: &str, text: &str) -> &[String] {
        let of = |name: &str| self.relations.get(&name.to_lowercase()).map(Vec::as_slice);
        let words: Vec<&str> = text.split(|c: char| !is_letter(c)).filter(|word| !word.is_empty()).collect();
        let by_alias = || {
            words.iter().enumerate().find_map(|(at, word)| {
                let next = words.get(at + 1).filter(|next| !next.eq_ignore_ascii_case("AS"));
                let alias = next.or_else(|| words.get(at + 2))?;
                if alias.eq_ignore_ascii_case(name) { of(word) } else { None }
            })
        };
        of(name).or_else(by_alias).unwrap_or_default()
    }
}

fn is_letter(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}

fn begins(word: &str, with: &str) -> bool {
    word.len() >= with.len()
        && word.is_char_boundary(with.len())
        && word[..with.len()].eq_ignore_ascii_case(with)
}

fn matching<S: AsRef<str>>(words: impl IntoIterator<Item = S>, with: &str) -> Vec<String> {
    let words = words.into_iter().filter(|word| begins(word.as_ref(), with));
    words.map(|word| word.as_ref().to_owned()).collect()
}

/// Files and folders whose path begins so.
fn paths(begin: &str) -> Vec<String> {
    let (folder, name) = begin.rsplit_once('/').map_or(("", begin), |(folder, name)| (folder, name));
    let shown = &begin[..begin.len() - name.len()];
    let folder = match (folder, shown) {
        ("", "") => ".",
        ("", _) => "/",
        (folder, _) => folder,
    };
    let Ok(entries) = std::fs::read_dir(folder) else { return Vec::new() };
    let mut found: Vec<String> = entries
        .flatten()
        .filter_map(|entry| {
            let known = entry.file_name().into_string().ok()?;
            let hidden = known.starts_with('.') && !name.starts_with('.');
            let slash = if entry.path().is_dir() { "/" } else { "" };
            (known.starts_with(name) && !hidden).then(|| format!("{shown}{known}{slash}"))
        })
        .collect();
    found.sort_unstable();
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    fn offered(before: &str) -> Vec<String> {
        let of = |columns: &[&str]| columns.iter().map(|name| (*name).to_owned()).collect();
        let relations = [
            ("transactions".to_owned(), of(&["user_id", "amount"])),
            ("training".to_owned(), of(&["user_id", "amount_7d"])),
        ];
        Words { relations: relations.into() }.offer(before, "").words
    }

    #[test]
    fn names_are_offered_where_they_fit() {
        assert_eq!(offered("SEL"), ["SELECT"]);
        assert_eq!(offered("sel"), ["select"]);
        assert_eq!(offered("SELECT * FROM tr"), ["training", "transactions"]);
        assert_eq!(offered("SELECT * FROM "), ["training", "transactions"]);
        assert_eq!(offered("SELECT am"), ["amount", "amount_7d"]);
        assert_eq!(offered("SELECT 1 FROM transactions WHERE am"), ["amount"]);
        assert_eq!(offered("SELECT 1 FROM training AS t, transactions x WHERE x."), ["user_id", "amount"]);
        assert_eq!(offered("SELECT 1 FROM training AS t WHERE T.am"), ["amount_7d"]);
        assert_eq!(offered("\\"), ["\\d", "\\timing", "\\o", "\\?", "\\q"]);
        assert_eq!(offered("-- x\n.mode nd"), ["ndjson"]);
        assert_eq!(offered("\\d tran"), ["transactions"]);
        assert_eq!(offered("SELECT 'am"), Vec::<String>::new());
        let cargo = concat!(env!("CARGO_MANIFEST_DIR"), "/Cargo.");
        let before = format!("SELECT * FROM '{cargo}");
        assert_eq!(offered(&before), [format!("{cargo}lock"), format!("{cargo}toml")]);
    }
}
