//! What the statements of a catalog name: locations, secrets in files, certificates. All of it must lie inside the
//! sandbox, and no location may have credentials in it, as locations are printed and stored.

use crate::connectors::files;
use crate::connectors::sandbox::Sandbox;
use crate::error::{Error, Place, Result};
use crate::sql::Catalog;
use crate::sql::options::{OptionValue, Options};

/// # Errors
/// User, at its place in the SQL: something lies outside the sandbox, or a location has credentials.
pub fn check(catalog: &Catalog, sandbox: &Sandbox) -> Result<()> {
    for source in &catalog.sources {
        options(&source.options, &source.place, true, sandbox)?;
    }
    for table in &catalog.tables {
        options(&table.options, &table.place, true, sandbox)?;
    }
    for sink in &catalog.sinks {
        options(&sink.options, &sink.place, false, sandbox)?;
    }
    Ok(())
}

fn options(options: &Options, statement: &Place, reads: bool, sandbox: &Sandbox) -> Result<()> {
    for (key, option) in options.values() {
        let checked = match named(key, option) {
            Named::Nothing => Ok(()),
            Named::Path(path) => files::without_credentials(path).and_then(|()| sandbox.check(path, reads)),
            Named::Program if sandbox.is_open() => Ok(()),
            Named::Program => Err(Error::user(format!("{key} cannot be set inside a sandbox"))
                .hint("It names a program or a library that is run.")),
        };
        checked.map_err(|error| {
            let place = option.place.clone().unwrap_or_else(|| statement.clone());
            error.context(format_args!("{}: {key}", options.owner())).at(place)
        })?;
    }
    Ok(())
}

enum Named<'a> {
    Nothing,
    Path(&'a str),
    Program,
}

fn named<'a>(key: &str, option: &'a OptionValue) -> Named<'a> {
    if option.secret {
        return option.value.strip_prefix("file:").map_or(Named::Nothing, Named::Path);
    }
    let value = option.value.as_str();
    match key {
        "tls_ca" if value == "system" => Named::Nothing,
        "location" | "path" | "tls_ca" => Named::Path(value),
        // The socket of a server on this machine.
        "url" if value.contains("unix:") => {
            let path = value.split_once("unix:").map_or(value, |(_, path)| path);
            Named::Path(path.strip_prefix("//").unwrap_or(path).split('?').next().unwrap_or_default())
        }
        _ => match key.strip_prefix("kafka.") {
            Some(of) if of.contains("cmd") || of.contains("plugin") => Named::Program,
            // Of librdkafka: ssl.ca.location, sasl.kerberos.keytab, sasl.oauthbearer.….file
            Some(_) if value == "probe" => Named::Nothing,
            Some(of) if ["location", "keytab", ".file", "path"].iter().any(|word| of.contains(word)) => {
                Named::Path(value)
            }
            _ => Named::Nothing,
        },
    }
}
