//! `millstream query`: one text by `-c`, a script on stdin, or a shell on a terminal.
//!
//! Statements end with `;` and may have several lines; each prints its rows on stdout. Lines that begin with `\` or `.` are
//! commands. A failing statement ends a text or a script, not the shell. In the shell Ctrl-C drops the query that runs or what
//! was typed so far, Ctrl-D leaves. Everything but rows is on stderr.

mod editor;
mod history;
mod runner;
mod terminal;
mod text;
mod words;

use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::PathBuf;
use std::time::Duration;

use clap::ValueEnum;
use tokio::signal::unix::{SignalKind, signal};

use self::editor::Editor;
use self::history::History;
use self::runner::Runner;
use self::terminal::{Terminal, Typed};
use self::text::{from_code, is_blank, is_command, is_word, statement_end};
use self::words::Words;
use super::output::{self, Format};
use super::{environment, grid, screen};
use crate::batch::{self, Answer, Ask, Found, Rest, Settings, World};
use crate::error::{Error, Result};
use crate::sql::SourceText;
use crate::sql::place::render;
use crate::stream::clock::Clock;

const HELP: &str = r"SELECT … ;          runs a query; statements end with ;
\d                  sources, tables, views and sinks     \d NAME   its columns; a path in quotes too
\timing [on|off]    how long each statement takes
\o FILE             rows go to a file; \o alone: to stdout again
.mode MODE          table, csv, json or ndjson
.limit N            at most so many rows of a query; 0: all
\?                  this                                 \q        leaves, as Ctrl-D does

Tab completes names, keywords and paths in quotes. Ctrl-R searches what was typed before. Ctrl-C cancels a query.
Files:     FROM './days/*.parquet'      FROM 's3://bucket/folder'      FROM './table' (Parquet, CSV, JSON, Delta)
Versions:  FROM t FOR VERSION AS OF 3   FROM t FOR TIMESTAMP AS OF '2026-01-31 12:00:00'
";

/// How long rows that are left out may be counted.
const COUNTING: Duration = Duration::from_secs(2);
/// How long a query may take to notice that it was cancelled.
const CANCELLING: Duration = Duration::from_secs(1);
/// Rows of a table that a terminal shows.
const TERMINAL_ROWS: usize = 1_000;

/// What queries are asked of, and how rows are shown.
pub struct Shell {
    /// Queries are tasks of their own, so that one that does not yield can be left behind.
    world: &'static World<'static>,
    settings: Settings,
    ask: Ask,
    format: Format,
    timing: bool,
    out: Option<(String, File)>,
    is_shell: bool,
    runner: Runner,
}

/// What a command wants next.
#[derive(Debug, PartialEq, Eq)]
enum Next {
    On,
    Leave,
}

impl Shell {
    /// # Errors
    /// No threads can be had.
    pub fn new(world: &'static World<'static>, ask: Ask, format: Format) -> Result<Self> {
        let (settings, runner) = (Settings::default(), Runner::new()?);
        Ok(Self { world, settings, ask, format, timing: false, out: None, is_shell: false, runner })
    }

    /// One text.
    ///
    /// # Errors
    /// Of the first statement that fails; stdout cannot be written.
    pub async fn once(mut self, sql: &str) -> Result<()> {
        match is_blank(sql) {
            true => Err(Error::user("the query is empty").hint("Give one with -c 'SELECT …'.")),
            false => self.texts("<command line>", sql).await.map(|_| ()),
        }
    }

    /// Until the end of stdin. Whether something may still run: of a query that was cancelled, tasks that
    /// `DataFusion` spawned may never yield, even if the query itself has ended.
    ///
    /// # Errors
    /// Of a script: the first one. Else: stdout or stdin cannot be used.
    pub async fn run(mut self) -> Result<bool> {
        let stdin = std::io::stdin();
        if stdin.is_terminal() {
            self.is_shell = true;
            return self.converse().await.map(|()| true);
        }
        let script = std::io::read_to_string(stdin)
            .map_err(|error| Error::external("stdin cannot be read").because(error))?;
        self.texts("<stdin>", &script).await.map(|_| false)
    }

    async fn converse(&mut self) -> Result<()> {
        let unwatched = |error| Error::external("signals cannot be watched").because(error);
        let mut terminate = signal(SignalKind::terminate()).map_err(unwatched)?;
        let mut hang_up = signal(SignalKind::hangup()).map_err(unwatched)?;
        let editor = Editor::new(History::open(history_file()), self.words().await);
        eprintln!(
            "millstream {}: \\? for help, \\d for what there is, \\q to leave",
            env!("CARGO_PKG_VERSION")
        );
        let plain = environment("TERM").is_none_or(|term| term == "dumb");
        let mut terminal = Terminal::open(editor, plain)?;
        loop {
            let typed = tokio::select! {
                typed = terminal.next() => typed,
                _ = terminate.recv() => return Ok(()),
                _ = hang_up.recv() => return Ok(()),
            };
            let text = match typed {
                Typed::Text(text) => text,
                Typed::Interrupted => continue,
                Typed::End => return Ok(()),
            };
            let done = tokio::select! {
                done = self.texts("<shell>", &text) => done,
                _ = terminate.recv() => return Ok(()),
                _ = hang_up.recv() => return Ok(()),
            };
            match done {
                Ok(Next::On) => {}
                Ok(Next::Leave) => return Ok(()),
                Err(error) => eprint!("{}", render(&error)),
            }
        }
    }

    /// The names that Tab completes.
    async fn words(&self) -> Words {
        let mut words = Words::default();
        for name in self.world.catalog.names() {
            // What does not plan has no columns here; a query of it says why.
            let described = batch::columns_of(self.world, &name).await;
            words.relations.insert(name, described.unwrap_or_default());
        }
        words
    }

    /// The statements and commands of a text; the last one may lack its `;`.
    async fn texts(&mut self, file: &str, text: &str) -> Result<Next> {
        let mut at = 0;
        loop {
            let rest = &text[at..];
            let code = from_code(rest);
            let whole = code.split(';').next().is_some_and(is_word) && is_blank(&code[4.min(code.len())..]);
            if is_command(code) || self.is_shell && whole {
                let line = code.lines().next().unwrap_or_default();
                if self.command(line.trim_end()).await? == Next::Leave {
                    return Ok(Next::Leave);
                }
                at = text.len() - code.len() + line.len();
                continue;
            }
            let end = at + statement_end(rest).unwrap_or(rest.len());
            if !is_blank(&text[at..end]) {
                // Blanks in the place of what is before: errors name the line of the whole text.
                let before = text[..at].chars().map(|c| if c == '\n' { '\n' } else { ' ' });
                let statement: String = before.chain(text[at..end].chars()).collect();
                self.statement(&SourceText::new(file, &statement)).await?;
            }
            if end == text.len() {
                return Ok(Next::On);
            }
            at = end;
        }
    }

    async fn statement(&mut self, text: &SourceText) -> Result<()> {
        let start = Clock.instant();
        let (world, text, ask, settings) = (self.world, text.clone(), self.ask, self.settings.clone());
        let found = self.task(async move { batch::query(&text, world, ask, settings).await }).await?;
        let Some(Found { answer, rest, settings }) = found else { return Ok(()) };
        let took = Clock.instant() - start;
        self.settings = settings;
        self.show(&answer)?;
        if let (Some(rest), Some(limit)) = (rest, self.ask.limit) {
            self.note(rest, limit).await;
        }
        if self.timing {
            eprintln!("time: {:.3} s", took.as_secs_f64());
        }
        Ok(())
    }

    /// Says how many rows were left out.
    async fn note(&mut self, rest: Rest, limit: usize) {
        let counting = async { Ok(tokio::time::timeout(COUNTING, rest.count()).await) };
        let how = if self.is_shell { ".limit" } else { "--limit" };
        match self.task(counting).await {
            Ok(Some(Ok(Ok(all)))) if all > limit => {
                eprintln!("{limit} of {all} rows, {} are left out; {how} N shows more", all - limit);
            }
            _ => eprintln!("the first {limit} rows, more are left out; {how} N shows more"),
        }
    }

    /// Runs something; in the shell Ctrl-C cancels it, then there is nothing.
    async fn task<T: Send + 'static>(
        &mut self,
        work: impl Future<Output = Result<T>> + Send + 'static,
    ) -> Result<Option<T>> {
        let mut task = self.runner.spawn(work);
        let interrupted = async {
            match self.is_shell {
                true => tokio::signal::ctrl_c().await,
                false => std::future::pending().await,
            }
        };
        let failed = |error| Error::internal("the query broke off").because(error);
        tokio::select! {
            done = &mut task => done.map_err(failed)?.map(Some),
            // Without signals Ctrl-C would not come here either.
            _ = interrupted => {
                task.abort();
                // What is printed comes before `cancelled`, if it ends.
                tokio::time::timeout(CANCELLING, task).await.ok();
                self.runner = Runner::new()?;
                eprintln!("cancelled");
                Ok(None)
            }
        }
    }

    fn show(&mut self, answer: &Answer) -> Result<()> {
        // SET has nothing to say.
        if answer.schema.fields().is_empty() && answer.batches.iter().all(|batch| batch.num_rows() == 0) {
            return Ok(());
        }
        match &mut self.out {
            Some((name, file)) => file
                .write_all(&output::encoded(answer, self.format)?)
                .map_err(|error| Error::external(format!("{name} cannot be written")).because(error)),
            None if self.format == Format::Table && output::stdout().is_terminal() => {
                let grid = grid::of(answer, screen::columns())?;
                output::text(&grid.text)?;
                if !grid.left_out.is_empty() {
                    eprintln!("columns left out: {}; .mode json shows all", grid.left_out.join(", "));
                }
                Ok(())
            }
            None => output::rows(answer, self.format),
        }
    }

    async fn command(&mut self, line: &str) -> Result<Next> {
        let line = line.trim_end_matches(';').trim_end();
        let (name, argument) = line.split_once(char::is_whitespace).unwrap_or((line, ""));
        let argument = argument.trim();
        match (name.to_ascii_lowercase().as_str(), argument) {
            ("\\q" | ".quit" | ".exit" | "quit" | "exit", _) => return Ok(Next::Leave),
            ("\\?" | ".help" | "help" | "\\h", _) => eprint!("{HELP}"),
            ("\\d" | "\\d+" | "\\dt", "") => self.show(&batch::relations(self.world.catalog)?)?,
            ("\\d" | "\\d+", name) => {
                let name = name.trim_matches(['"', '\'']).replace('"', "\"\"");
                self.statement(&SourceText::new("<shell>", &format!("DESCRIBE \"{name}\""))).await?;
            }
            ("\\timing" | ".timer", how) => {
                self.timing = match how {
                    "" => !self.timing,
                    "on" => true,
                    "off" => false,
                    _ => return Err(unknown(name, how, "on and off")),
                };
                eprintln!("timing is {}", if self.timing { "on" } else { "off" });
            }
            ("\\o" | ".output", "") => self.out = None,
            ("\\o" | ".output", file) => {
                self.world.sandbox.check(file, false)?;
                let unmade = |error| Error::external(format!("{file} cannot be written")).because(error);
                self.out = Some((file.to_owned(), File::create(file).map_err(unmade)?));
            }
            (".mode", mode) => match Format::from_str(mode, true) {
                Ok(Format::Arrow) | Err(_) => return Err(unknown(name, mode, "table, csv, json and ndjson")),
                Ok(format) => {
                    self.format = format;
                    self.ask.limit = self.ask.limit.or_else(|| default_limit(format));
                }
            },
            (".limit" | ".maxrows", rows) => {
                let Ok(rows) = rows.parse::<usize>() else {
                    return Err(unknown(name, rows, "numbers; 0 is all"));
                };
                self.ask.limit = Some(rows).filter(|rows| *rows > 0);
            }
            _ => {
                return Err(Error::user(format!("the command {name} is not known")).hint("\\? lists them."));
            }
        }
        Ok(Next::On)
    }
}

/// Rows that are shown if nobody says how many.
pub fn default_limit(format: Format) -> Option<usize> {
    let is_seen = format == Format::Table && output::stdout().is_terminal();
    is_seen.then_some(TERMINAL_ROWS)
}

fn unknown(command: &str, argument: &str, known: &str) -> Error {
    Error::user(format!("{command} does not know '{argument}'")).hint(format!("It knows {known}."))
}

/// `MILLSTREAM_HISTORY`, else a file in the user's folder; set and empty: none.
fn history_file() -> Option<PathBuf> {
    match environment("MILLSTREAM_HISTORY") {
        Some(file) => Some(PathBuf::from(file)).filter(|file| !file.as_os_str().is_empty()),
        None => environment("HOME").map(|home| PathBuf::from(home).join(".millstream_history")),
    }
}
