//! What a set of SQL files declares. Statements may refer forward and across files.

use std::path::{Path, PathBuf};

use crate::error::{Error, Place, Result};
use crate::sql::parser::parse;
use crate::sql::place::SourceText;
use crate::sql::statement::{CreateSchedule, CreateSink, CreateSource, CreateTable, CreateView, Statement};
use crate::sql::variables::Variables;
use crate::stream::letters;

#[derive(Debug, Clone, Default)]
pub struct Catalog {
    pub sources: Vec<CreateSource>,
    pub tables: Vec<CreateTable>,
    pub views: Vec<CreateView>,
    pub sinks: Vec<CreateSink>,
    pub schedules: Vec<CreateSchedule>,
    /// Statements that declare nothing, in order.
    pub others: Vec<Statement>,
    /// Name and place of everything declared; one namespace, as a sink can be queried by name.
    names: Vec<(String, Place)>,
}

impl Catalog {
    /// # Errors
    /// The first user error; a duplicate name is one, and names both places.
    pub fn load(files: &[SourceText], variables: &Variables<'_>) -> Result<Self> {
        let mut catalog = Self::default();
        for file in files {
            for statement in parse(file, variables)? {
                catalog.add(statement)?;
            }
        }
        Ok(catalog)
    }

    fn add(&mut self, statement: Statement) -> Result<()> {
        match statement {
            Statement::CreateSource(s) => {
                self.declare(&s.name, s.or_replace, &s.place)?;
                self.sources.push(s);
            }
            Statement::CreateTable(t) => {
                self.declare(&t.name, t.or_replace, &t.place)?;
                self.tables.push(t);
            }
            Statement::CreateView(v) => {
                self.declare(&v.name, v.or_replace, &v.place)?;
                self.views.push(v);
            }
            Statement::CreateSink(s) => {
                self.declare(&s.name, s.or_replace, &s.place)?;
                self.sinks.push(s);
            }
            Statement::CreateSchedule(s) => {
                self.declare(&s.name, s.or_replace, &s.place)?;
                self.schedules.push(*s);
            }
            other => self.others.push(other),
        }
        Ok(())
    }

    fn declare(&mut self, name: &str, or_replace: bool, place: &Place) -> Result<()> {
        if name == letters::NAME {
            let hint = "It is the relation of records that could not become rows; choose another name.";
            return Err(Error::user(format!("the name {name} is taken")).hint(hint).at(place.clone()));
        }
        if let Some((_, first)) = self.names.iter().find(|(known, _)| known == name) {
            if !or_replace {
                let message = format!("{name} is declared twice, first at {}:{}", first.file, first.line);
                return Err(Error::user(message)
                    .hint("Rename one, or write CREATE OR REPLACE.")
                    .at(place.clone()));
            }
            self.names.retain(|(known, _)| known != name);
            self.sources.retain(|s| s.name != name);
            self.tables.retain(|t| t.name != name);
            self.views.retain(|v| v.name != name);
            self.sinks.retain(|s| s.name != name);
            self.schedules.retain(|s| s.name != name);
        }
        self.names.push((name.to_owned(), place.clone()));
        Ok(())
    }

    /// Everything declared, in order.
    pub fn names(&self) -> Vec<String> {
        self.names.iter().map(|(name, _)| name.clone()).collect()
    }

    pub fn source(&self, name: &str) -> Option<&CreateSource> {
        self.sources.iter().find(|source| source.name == name)
    }

    pub fn table(&self, name: &str) -> Option<&CreateTable> {
        self.tables.iter().find(|table| table.name == name)
    }

    pub fn view(&self, name: &str) -> Option<&CreateView> {
        self.views.iter().find(|view| view.name == name)
    }

    pub fn sink(&self, name: &str) -> Option<&CreateSink> {
        self.sinks.iter().find(|sink| sink.name == name)
    }

    pub fn schedule(&self, name: &str) -> Option<&CreateSchedule> {
        self.schedules.iter().find(|schedule| schedule.name == name)
    }
}

/// The SQL files of the paths given: a folder stands for its `*.sql`, sorted, without `*_producer.sql`.
///
/// # Errors
/// A user error: a path that does not exist, a folder without SQL.
pub fn pipeline_files(paths: &[PathBuf]) -> Result<Vec<PathBuf>> {
    let mut files = Vec::new();
    for path in paths {
        if !path.is_dir() {
            files.push(path.clone());
            continue;
        }
        let entries = std::fs::read_dir(path).map_err(|error| unreadable(path, error))?;
        let mut found: Vec<PathBuf> =
            entries.flatten().map(|entry| entry.path()).filter(|p| is_pipeline(p)).collect();
        if found.is_empty() {
            let hint = "Give SQL files, or a folder with .sql files.";
            return Err(Error::user(format!("{} holds no .sql file", path.display())).hint(hint));
        }
        found.sort();
        files.append(&mut found);
    }
    Ok(files)
}

fn is_pipeline(path: &Path) -> bool {
    let sql = path.extension().is_some_and(|extension| extension == "sql");
    let producer = path.file_stem().is_some_and(|stem| stem.to_string_lossy().ends_with("_producer"));
    sql && !producer
}

/// # Errors
/// A user error that names the file.
pub fn read(path: &Path) -> Result<SourceText> {
    let text = std::fs::read_to_string(path).map_err(|error| unreadable(path, error))?;
    Ok(SourceText::new(&path.to_string_lossy(), &text))
}

fn unreadable(path: &Path, error: std::io::Error) -> Error {
    let hint = "Give the path of a SQL file or of a folder of SQL files.";
    Error::user(format!("{} cannot be read", path.display())).because(error).hint(hint)
}
