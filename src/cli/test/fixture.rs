//! What a fixture file says, and which files are fixtures.
//!
//! `p.test.yaml` beside `p.sql` tests it; `pipeline:` names other SQL files, from the fixture's folder. A fixture is
//!
//! ```yaml
//! pipeline: [p.sql, q.sql]        # default: the SQL file of the same name
//! variables: {LAKE: /tmp/lake}    # of every case
//! cases:
//!   - name: what it shows
//!     variables: {LAKE: /other}
//!     input:
//!       a_source: [{id: 1, at: 2026-01-02T00:00:00Z}, 'no json', null]
//!       another: {csv: "id,at\n1,…"}          # or rows, ndjson, file: path.csv
//!     expect:
//!       a_view_or_sink: {rows: [{id: 1}], partial: true, tolerance: 1e-6}
//!     late: 0
//!     dead_letters: 1
//! random:                           # values for --random, by source and column
//!   a_source: {currency: [EUR, null], nested: {zip: ['02139']}}
//! ```

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::generate::{Hints, join};
use super::yaml::{self, Key, Kind, Node, unknown};
use crate::connectors::sandbox::Sandbox;
use crate::error::{Error, Place, Result};
use crate::sql::catalog;

const SUFFIXES: [&str; 2] = [".test.yaml", ".test.yml"];

#[derive(Debug)]
pub struct Fixture {
    pub path: PathBuf,
    /// SQL files.
    pub pipeline: Vec<PathBuf>,
    pub variables: BTreeMap<String, String>,
    pub cases: Vec<Case>,
    /// Values for random rows, by source.
    pub random: BTreeMap<String, Hints>,
}

/// SQL files that random rows go through.
#[derive(Debug)]
pub struct Pipeline {
    /// What names it on the command line: a fixture or a SQL file.
    pub path: PathBuf,
    pub files: Vec<PathBuf>,
    pub variables: BTreeMap<String, String>,
    pub random: BTreeMap<String, Hints>,
}

#[derive(Debug)]
pub struct Case {
    pub name: String,
    pub place: Place,
    pub variables: BTreeMap<String, String>,
    pub inputs: Vec<Input>,
    pub expects: Vec<Expect>,
    /// Rows that must be late.
    pub late: Option<u64>,
    /// Records that must be dead letters, of the source and of views.
    pub dead_letters: Option<u64>,
}

/// Where a fixture stands, for the files that it names.
struct Ground<'a> {
    path: &'a Path,
    sandbox: &'a Sandbox,
}

impl Ground<'_> {
    /// A path from the fixture's folder.
    fn file(&self, node: &Node, what: &str) -> Result<PathBuf> {
        let file = self.path.parent().unwrap_or(Path::new("")).join(node.text(what)?);
        let inside = self.sandbox.check(&file.to_string_lossy(), true);
        inside.map_err(|error| error.at(node.place.clone()))?;
        Ok(file)
    }
}

/// Records of a source.
#[derive(Debug)]
pub struct Input {
    pub source: Key,
    pub data: Data,
}

/// Rows of a source, view or sink.
#[derive(Debug)]
pub struct Expect {
    pub relation: Key,
    pub data: Data,
    /// More rows and columns are fine.
    pub partial: bool,
    /// Of floats, relative for numbers above 1.
    pub tolerance: Option<f64>,
}

#[derive(Debug, Clone)]
pub enum Data {
    Rows(Vec<Node>),
    /// With a line of column names.
    Csv(Text),
    /// An object per line.
    Ndjson(Text),
}

#[derive(Debug, Clone)]
pub struct Text {
    pub text: String,
    /// Of the node that holds or names it.
    pub place: Place,
}

/// The fixtures that files and folders stand for, each once.
///
/// # Errors
/// User: a folder or pipeline without fixture.
pub fn find(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    for path in paths {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        if path.is_dir() {
            found.extend(in_folder(path)?);
        } else if let Some(stem) = name.strip_suffix(".sql") {
            found.push(beside(path, stem).ok_or_else(|| {
                Error::user(format!("{} has no fixture", path.display()))
                    .hint(format!("Write cases into {stem}.test.yaml beside it."))
            })?);
        } else if name.ends_with(".yaml") || name.ends_with(".yml") {
            found.push(path.clone());
        } else {
            let hint = "Give folders, SQL files or fixtures (name.test.yaml).";
            return Err(Error::user(format!("{} is no fixture", path.display())).hint(hint));
        }
    }
    let mut seen = Vec::new();
    found.retain(|path| {
        !seen.contains(path) && {
            seen.push(path.clone());
            true
        }
    });
    Ok(found)
}

/// The fixture of a SQL file.
fn beside(sql: &Path, stem: &str) -> Option<PathBuf> {
    let names = SUFFIXES.iter().map(|suffix| sql.with_file_name(format!("{stem}{suffix}")));
    names.into_iter().find(|fixture| fixture.is_file())
}

/// The pipelines that files and folders stand for, each once: those of fixtures, and SQL files that no fixture names.
///
/// # Errors
/// User: a path that is neither, a fixture that cannot be read.
pub fn pipelines(paths: &[PathBuf], sandbox: &Sandbox) -> Result<Vec<Pipeline>> {
    let mut found: Vec<Pipeline> = Vec::new();
    let mut bare = Vec::new();
    for path in paths {
        let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let fixtures = if path.is_dir() {
            bare.extend(catalog::pipeline_files(std::slice::from_ref(path))?);
            in_folder(path).unwrap_or_default()
        } else if let Some(stem) = name.strip_suffix(".sql") {
            let fixture = beside(path, stem);
            bare.extend(fixture.is_none().then(|| path.clone()));
            fixture.into_iter().collect()
        } else {
            find(std::slice::from_ref(path))?
        };
        for path in fixtures {
            let Fixture { pipeline, variables, random, .. } = read(&path, sandbox)?;
            if found.iter().all(|known| known.path != path) {
                found.push(Pipeline { path, files: pipeline, variables, random });
            }
        }
    }
    for path in bare {
        if found.iter().all(|known| known.path != path && !known.files.contains(&path)) {
            let files = vec![path.clone()];
            found.push(Pipeline { path, files, variables: BTreeMap::new(), random: BTreeMap::new() });
        }
    }
    Ok(found)
}

fn in_folder(folder: &Path) -> Result<Vec<PathBuf>> {
    let entries = std::fs::read_dir(folder)
        .map_err(|error| Error::user(format!("{} cannot be read", folder.display())).because(error))?;
    let is_fixture = |path: &PathBuf| {
        let name = path.to_string_lossy();
        SUFFIXES.iter().any(|suffix| name.ends_with(suffix))
    };
    let mut found: Vec<PathBuf> = entries.flatten().map(|entry| entry.path()).filter(is_fixture).collect();
    if found.is_empty() {
        let hint = "A fixture is a file name.test.yaml beside name.sql.";
        return Err(Error::user(format!("{} holds no fixture", folder.display())).hint(hint));
    }
    found.sort();
    Ok(found)
}

/// # Errors
/// User, with its place: the file is not there, or what it says is no fixture.
pub fn read(path: &Path, sandbox: &Sandbox) -> Result<Fixture> {
    let ground = &Ground { path, sandbox };
    let source = catalog::read(path).map_err(|error| error.hint("Give the path of a fixture."))?;
    let Some(root) = yaml::parse(&source)? else {
        return Err(Error::user("the fixture is empty").hint("Write cases:").at(source.place(1, 1, 1)));
    };
    let (mut pipeline, mut variables, mut cases, mut random) = (None, BTreeMap::new(), None, BTreeMap::new());
    for (key, value) in root.map("a fixture")? {
        match key.name.as_str() {
            "pipeline" => pipeline = Some(pipeline_of(ground, value)?),
            "variables" => variables = variables_of(value)?,
            "cases" => cases = Some(cases_of(ground, value)?),
            "random" => {
                for (source, columns) in value.map("random")? {
                    let mut hints = Hints::new();
                    hints_of(None, columns, &mut hints)?;
                    random.insert(source.name.clone(), hints);
                }
            }
            _ => return Err(unknown(key, "a fixture", &["pipeline", "variables", "cases", "random"])),
        }
    }
    let cases = cases.filter(|cases: &Vec<Case>| !cases.is_empty());
    let cases = cases.ok_or_else(|| root.wrong("the fixture has no cases").hint("Write cases:"))?;
    let pipeline = match pipeline {
        Some(pipeline) => pipeline,
        None => vec![sql_beside(path, &root)?],
    };
    Ok(Fixture { path: path.to_owned(), pipeline, variables, cases, random })
}

/// Lists of values by column; a map stands for the fields of a struct.
fn hints_of(parent: Option<&str>, node: &Node, hints: &mut Hints) -> Result<()> {
    for (key, value) in node.map("values by column")? {
        let path = join(parent, &key.name);
        if let Kind::Map(_) = value.kind {
            hints_of(Some(&path), value, hints)?;
            continue;
        }
        let values: Vec<String> = value.list("the values of a column")?.iter().map(Node::json).collect();
        if values.is_empty() {
            return Err(value.wrong("no values are given").hint("Leave the column out."));
        }
        hints.insert(path, values);
    }
    Ok(())
}

fn sql_beside(path: &Path, root: &Node) -> Result<PathBuf> {
    let name = path.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
    let stem = SUFFIXES.iter().find_map(|suffix| name.strip_suffix(suffix));
    let beside = stem.map(|stem| path.with_file_name(format!("{stem}.sql"))).filter(|path| path.is_file());
    beside.ok_or_else(|| {
        root.wrong("no SQL file lies beside the fixture").hint("Name it: pipeline: transactions.sql")
    })
}

fn pipeline_of(ground: &Ground<'_>, node: &Node) -> Result<Vec<PathBuf>> {
    let file = |node: &Node| {
        let file = ground.file(node, "a file of the pipeline")?;
        match file.exists() {
            true => Ok(file),
            false => Err(node.wrong(format!("{} does not exist", file.display()))),
        }
    };
    match &node.kind {
        Kind::List(items) => items.iter().map(file).collect(),
        _ => Ok(vec![file(node)?]),
    }
}

fn variables_of(node: &Node) -> Result<BTreeMap<String, String>> {
    let pair = |(key, value): &(Key, Node)| Ok((key.name.clone(), value.text("a variable")?.to_owned()));
    node.map("variables")?.iter().map(pair).collect()
}

fn cases_of(ground: &Ground<'_>, node: &Node) -> Result<Vec<Case>> {
    let mut cases: Vec<Case> = Vec::new();
    for node in node.list("cases")? {
        let case = case_of(ground, node)?;
        if cases.iter().any(|other| other.name == case.name) {
            return Err(Error::user(format!("two cases are named '{}'", case.name)).at(case.place));
        }
        cases.push(case);
    }
    Ok(cases)
}

fn case_of(ground: &Ground<'_>, node: &Node) -> Result<Case> {
    let mut name = None;
    let mut case = Case {
        name: String::new(),
        place: node.place.clone(),
        variables: BTreeMap::new(),
        inputs: Vec::new(),
        expects: Vec::new(),
        late: None,
        dead_letters: None,
    };
    let count = "a number of rows";
    for (key, value) in node.map("a case")? {
        match key.name.as_str() {
            "name" => name = Some((value.text("the name of a case")?.to_owned(), value.place.clone())),
            "variables" => case.variables = variables_of(value)?,
            "input" => {
                for (source, value) in value.map("input")? {
                    let (data, _, _) = data_of(ground, value, false)?;
                    case.inputs.push(Input { source: source.clone(), data });
                }
            }
            "expect" => {
                for (relation, value) in value.map("expect")? {
                    let (data, partial, tolerance) = data_of(ground, value, true)?;
                    case.expects.push(Expect { relation: relation.clone(), data, partial, tolerance });
                }
            }
            "late" => case.late = Some(value.parsed(count)?),
            "dead_letters" => case.dead_letters = Some(value.parsed(count)?),
            _ => {
                let known = ["name", "variables", "input", "expect", "late", "dead_letters"];
                return Err(unknown(key, "a case", &known));
            }
        }
    }
    let Some((name, place)) = name else {
        return Err(node.wrong("a case lacks its name").hint("Write name: what it shows"));
    };
    if case.expects.is_empty() {
        let error = Error::user(format!("the case '{name}' expects nothing")).at(place);
        return Err(error.hint("Write expect: with the rows of a view or sink."));
    }
    (case.name, case.place) = (name, place);
    Ok(case)
}

/// Rows with `partial` and `tolerance`, which only expectations may have.
fn data_of(ground: &Ground<'_>, node: &Node, expected: bool) -> Result<(Data, bool, Option<f64>)> {
    if let Kind::List(rows) = &node.kind {
        return Ok((Data::Rows(rows.clone()), false, None));
    }
    let (mut data, mut partial, mut tolerance) = (None, false, None);
    let known: &[&str] = match expected {
        true => &["rows", "csv", "ndjson", "file", "partial", "tolerance"],
        false => &["rows", "csv", "ndjson", "file"],
    };
    for (key, value) in node.map("rows, or where they come from,")? {
        let inline = || {
            Ok::<_, Error>(Text { text: value.text("CSV or NDJSON")?.to_owned(), place: value.place.clone() })
        };
        let found = match key.name.as_str() {
            "rows" => Data::Rows(value.list("rows")?.to_vec()),
            "csv" => Data::Csv(inline()?),
            "ndjson" => Data::Ndjson(inline()?),
            "file" => file_of(ground, value)?,
            "partial" if expected => {
                partial = value.flag()?;
                continue;
            }
            "tolerance" if expected => {
                let number: f64 = value.parsed("a number such as 1e-9")?;
                if !(number >= 0.0 && number.is_finite()) {
                    return Err(value.wrong("a tolerance is not negative"));
                }
                tolerance = Some(number);
                continue;
            }
            _ => return Err(unknown(key, "this", known)),
        };
        if data.replace(found).is_some() {
            let error = Error::user("the rows are given twice").at(key.place.clone());
            return Err(error.hint("Write one of rows, csv, ndjson and file."));
        }
    }
    let data =
        data.ok_or_else(|| node.wrong("no rows are given").hint("Write rows: [] if there are none."))?;
    Ok((data, partial, tolerance))
}

fn file_of(ground: &Ground<'_>, node: &Node) -> Result<Data> {
    let file = ground.file(node, "a file")?;
    let text = std::fs::read_to_string(&file)
        .map_err(|error| node.wrong(format!("{} cannot be read", file.display())).because(error))?;
    let text = Text { text, place: node.place.clone() };
    match file.extension().and_then(|extension| extension.to_str()) {
        Some("csv") => Ok(Data::Csv(text)),
        Some("ndjson" | "jsonl") => Ok(Data::Ndjson(text)),
        _ => Err(node.wrong("files of rows end in .csv or .ndjson")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fault(text: &str) -> String {
        let folder = tempfile::tempdir().unwrap();
        std::fs::write(folder.path().join("p.sql"), "").unwrap();
        let path = folder.path().join("p.test.yaml");
        std::fs::write(&path, text).unwrap();
        let error = read(&path, &Sandbox::default()).unwrap_err();
        let place = error.place().unwrap();
        format!("{}:{}: {} ({})", place.line, place.column, error.message(), error.hint_text().unwrap_or("-"))
    }

    #[test]
    fn what_is_wrong_is_said_with_its_place() {
        let found = [
            "",
            "case: []",
            "cases: []",
            "cases:\n- input: {}",
            "cases:\n- {name: x, input: {s: []}}",
            "cases:\n- {name: x, expect: {s: {row: []}}}",
            "cases:\n- {name: x, expect: {s: {partial: yes}}}",
            "cases:\n- {name: x, input: {s: {rows: [], partial: true}}}",
            "cases:\n- {name: x, expect: {s: {rows: [], csv: x}}}",
            "cases:\n- {name: x, expect: {s: {tolerance: -1, rows: []}}}",
            "cases:\n- {name: x, expect: {s: 3}}",
            "cases:\n- {name: x, late: few, expect: {s: []}}",
            "cases:\n- {name: x, expect: {s: []}}\n- {name: x, expect: {s: []}}",
            "pipeline: q.sql\ncases: []",
        ]
        .map(fault)
        .join("\n");
        assert!(found.contains("1:1: the fixture is empty"), "{found}");
        assert!(found.contains("1:1: a fixture has no case (Did you mean cases?)"), "{found}");
        assert!(found.contains("2:3: a case lacks its name"), "{found}");
        assert!(found.contains("the case 'x' expects nothing"), "{found}");
        assert!(found.contains("2:26: this has no row (Did you mean rows?)"), "{found}");
        assert!(found.contains("expected true or false, found 'yes'"), "{found}");
        assert!(found.contains("this has no partial"), "{found}");
        assert!(found.contains("the rows are given twice"), "{found}");
        assert!(found.contains("a tolerance is not negative"), "{found}");
        assert!(found.contains("expected a number of rows, found 'few'"), "{found}");
        assert!(
            found.contains("3:10: two cases are named 'x'") || found.contains("3:9: two cases"),
            "{found}"
        );
        assert!(found.contains("q.sql does not exist"), "{found}");
    }

    #[test]
    fn fixtures_are_found_beside_pipelines() {
        let folder = tempfile::tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for name in ["a.sql", "b.sql", "b.test.yaml", "c.test.yml", "d.yaml"] {
            std::fs::write(path(name), "").unwrap();
        }
        let all = find(&[folder.path().to_owned(), path("b.sql")]).unwrap();
        assert_eq!(all, [path("b.test.yaml"), path("c.test.yml")]);
        assert_eq!(find(&[path("d.yaml")]).unwrap(), [path("d.yaml")]);
        assert!(find(&[path("a.sql")]).unwrap_err().message().ends_with("a.sql has no fixture"));
        assert!(find(&[path("x.txt")]).is_err());
    }
}
