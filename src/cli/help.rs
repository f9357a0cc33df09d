//! `millstream help connectors`, `millstream help connector NAME`; of a command, its `--help`.

use clap::CommandFactory;

use super::{Cli, output, screen};
use crate::connectors::reference::{self, CONNECTORS, Connector, Role};
use crate::error::{Error, Result};

/// Words behind an option's name are moved in so far.
const INDENT: usize = 6;
/// Nobody reads longer lines.
const LONGEST: usize = 100;

/// # Errors
/// User: there is no such command or connector.
pub fn run(words: &[String]) -> Result<()> {
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    match words[..] {
        ["connectors"] | ["connector"] => output::text(&list()),
        ["connector" | "connectors", name] => {
            let connector = reference::connector(name).ok_or_else(|| reference::unknown(name))?;
            output::text(&describe(connector, screen::columns().min(LONGEST)))
        }
        [] => output::text(&Cli::command().render_long_help().to_string()),
        [name, ..] => {
            let mut program = Cli::command();
            program.build();
            match program.find_subcommand_mut(name) {
                Some(command) if words.len() == 1 => output::text(&command.render_long_help().to_string()),
                _ => Err(Error::user(format!("there is no help for {}", words.join(" ")))
                    .hint("Ask for a command, for connectors, or for connector NAME.")),
            }
        }
    }
}

fn roles(connector: &Connector) -> String {
    let roles: Vec<&str> = connector.roles().map(Role::word).collect();
    let missing = if connector.built { "" } else { ", not in this build" };
    format!("{}{missing}", roles.join(", "))
}

fn list() -> String {
    let mut text = String::new();
    for connector in CONNECTORS {
        text.push_str(&format!("{:<10} {:<13} {}\n", connector.name, roles(connector), connector.meaning));
    }
    text + "\nmillstream help connector NAME lists its options.\n"
}

fn describe(connector: &Connector, width: usize) -> String {
    let mut text = format!("{} ({})\n{}\n", connector.name, roles(connector), connector.meaning);
    for role in connector.roles() {
        text.push_str(&format!("\n{} WITH (connector = '{}', …)\n", role.statement(), connector.name));
        for option in connector.listed(role) {
            let default = match option.default {
                "required" => "required".to_owned(),
                default => format!("default: {default}"),
            };
            text.push_str(&format!("\n  {}   {}; {default}\n", option.name, option.takes));
            let meaning = format!("{} Example: '{}'", option.meaning, option.example);
            text.push_str(&wrapped(&meaning, width));
        }
    }
    text
}

/// Moved in, and broken between words.
fn wrapped(text: &str, width: usize) -> String {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split(' ') {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(format!("{}{word}", " ".repeat(INDENT))),
        }
    }
    lines.join("\n") + "\n"
}
