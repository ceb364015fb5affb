//! The log: what the parts of a process say while it runs, as `tracing` events. A user sees notices on standard error; `--log` asks
//! for more, there or in a file. Whoever says something never waits for it to be written, and a full disk loses lines and nothing
//! else: see [`print::Lossy`].

use std::fmt::Write;
use std::path::PathBuf;
use std::time::{SystemTime, UNIX_EPOCH};

use clap::{Args, ValueEnum};
use pageferry::cli::print::{self, Lossy};
use serde_json::{Map, Value, json};
use tracing::field::{Field, Visit};
use tracing::span::{Attributes, Id, Record};
use tracing::{Event, Level, Metadata, Subscriber};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::{Context, Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;

use super::file;

/// Longest text of one event, in characters: peers have a say in some.
const TEXT_MAX: usize = 8 << 10;

/// Options of every command.
#[derive(Clone, Debug, Args)]
#[command(next_help_heading = "Log")]
pub(super) struct LogArgs {
    /// Log so much: off, error, warn, info, debug or trace; of a part of the program alone: transport=debug,info
    #[arg(long, global = true, value_name = "FILTER", value_parser = filter)]
    log: Option<Targets>,
    /// Append the log to this file, instead of writing it to standard error
    #[arg(long, global = true, value_name = "FILE")]
    log_file: Option<PathBuf>,
    /// What a line of the log is
    #[arg(long, global = true, value_enum, default_value_t = Format::Text)]
    log_format: Format,
}

/// What a line of the log is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Time, level, part, message
    Text,
    /// A JSON object
    Json,
}

fn filter(text: &str) -> Result<Targets, String> {
    let hint = "use off, error, warn, info, debug or trace, or such as transport=debug,info";
    match text.parse() {
        Ok(targets) if !text.trim().is_empty() => Ok(targets),
        Ok(_) => Err(hint.into()),
        Err(e) => Err(format!("{e}; {hint}")),
    }
}

impl LogArgs {
    /// Begins to log.
    ///
    /// # Errors
    /// When the file cannot be written.
    pub(super) fn start(&self) -> Result<(), String> {
        let asked = self.log.is_some() || self.log_file.is_some() || self.log_format == Format::Json;
        let queue = match &self.log_file {
            Some(path) => {
                let complain = |e| format!("--log-file: cannot write to {}: {e}", path.display());
                let file = file::write(path, true).map_err(complain)?;
                Lossy::new("log", Box::new(file), lost(self.log_format))
            }
            None => print::errors().clone(),
        };
        let filter = self.log.clone().unwrap_or_else(|| Targets::new().with_default(Level::INFO));
        let detail = asked.then_some(Detail { filter, queue, format: self.log_format });
        let log = Log { notices: detail.is_none() || self.log_file.is_some(), detail };
        tracing::subscriber::set_global_default(tracing_subscriber::registry().with(log))
            .map_err(|e| e.to_string())
    }
}

fn lost(format: Format) -> fn(u64) -> String {
    match format {
        Format::Text => |lost| format!("{} WARN log: {lost} lines before this one were lost\n", now()),
        Format::Json => |lost| {
            let message = format!("{lost} lines before this one were lost");
            json!({ "time": now(), "level": "warn", "target": "log", "message": message }).to_string() + "\n"
        },
    }
}

/// What `--log` asks for.
struct Detail {
    filter: Targets,
    queue: Lossy,
    format: Format,
}

struct Log {
    /// Show what a user is to know on standard error.
    notices: bool,
    detail: Option<Detail>,
}

impl Log {
    /// What a user is to know: what commands say, and what goes wrong anywhere.
    fn is_notice(&self, about: &Metadata<'_>) -> bool {
        let most = if about.target().starts_with("pageferry::cli") { Level::INFO } else { Level::WARN };
        self.notices && about.is_event() && *about.level() <= most
    }
}

/// The part of the program that an event comes from, without what all of them begin with.
fn part(target: &str) -> &str {
    let part = target.strip_prefix("pageferry::cli::").or_else(|| target.strip_prefix("pageferry::"));
    // Users know the engine by its name, wherever it lives.
    let engine = || target.strip_prefix("transport::").filter(|part| part.starts_with("engine"));
    part.or_else(engine).or_else(|| target.strip_prefix("pageferry_")).unwrap_or(target)
}

impl<S: Subscriber + for<'a> LookupSpan<'a>> Layer<S> for Log {
    fn enabled(&self, about: &Metadata<'_>, _: Context<'_, S>) -> bool {
        let wanted = |detail: &Detail| detail.filter.would_enable(part(about.target()), about.level());
        self.is_notice(about) || self.detail.as_ref().is_some_and(wanted)
    }

    fn on_new_span(&self, attributes: &Attributes<'_>, id: &Id, context: Context<'_, S>) {
        let mut fields = Fields::default();
        attributes.record(&mut fields);
        if let Some(span) = context.span(id) {
            span.extensions_mut().insert(fields);
        }
    }

    fn on_record(&self, id: &Id, values: &Record<'_>, context: Context<'_, S>) {
        if let Some(span) = context.span(id)
            && let Some(fields) = span.extensions_mut().get_mut::<Fields>()
        {
            values.record(fields);
        }
    }

    fn on_event(&self, event: &Event<'_>, context: Context<'_, S>) {
        let about = event.metadata();
        let mut fields = Fields::default();
        event.record(&mut fields);
        if self.is_notice(about) {
            print::note(format_args!("pageferry: {}", fields.text()));
        }
        let Some(detail) = &self.detail else { return };
        if !detail.filter.would_enable(part(about.target()), about.level()) {
            return;
        }
        // What happens within spans is told with their names and fields, the outermost first.
        let mut spans = Vec::new();
        for span in context.event_scope(event).into_iter().flat_map(|scope| scope.from_root()) {
            let extensions = span.extensions();
            spans.push((span.name(), extensions.get::<Fields>().cloned().unwrap_or_default()));
        }
        let line = match detail.format {
            Format::Text => {
                let spans: String =
                    spans.iter().map(|(name, fields)| format!("{name}{{{}}}: ", fields.text())).collect();
                format!("{} {} {}: {spans}{}\n", now(), about.level(), part(about.target()), fields.text())
            }
            Format::Json => {
                let mut object = Map::new();
                object.insert("time".into(), now().into());
                object.insert("level".into(), about.level().as_str().to_ascii_lowercase().into());
                object.insert("target".into(), part(about.target()).into());
                for (name, fields) in spans {
                    object.insert(name.into(), Value::Object(fields.named.into_iter().collect()));
                }
                object.insert("message".into(), fields.message.unwrap_or_default().into());
                object.extend(fields.named);
                Value::Object(object).to_string() + "\n"
            }
        };
        detail.queue.push(line.into_bytes());
    }
}

/// What an event or a span says.
#[derive(Clone, Debug, Default)]
struct Fields {
    message: Option<String>,
    named: Vec<(String, Value)>,
}

impl Fields {
    /// The message, and the fields behind it. Nothing in it is taken for a line's end, or for more by a terminal.
    fn text(&self) -> String {
        let mut text = self.message.clone().unwrap_or_default();
        for (name, value) in &self.named {
            let space = if text.is_empty() { "" } else { " " };
            // Writing to a String cannot fail.
            let _ = write!(text, "{space}{name}={value}");
        }
        let mut plain = String::with_capacity(text.len());
        for c in text.chars() {
            if c.is_control() { plain.extend(c.escape_default()) } else { plain.push(c) }
        }
        plain
    }

    fn add(&mut self, field: &Field, value: Value) {
        self.named.push((field.name().into(), value));
    }
}

impl Visit for Fields {
    fn record_debug(&mut self, field: &Field, value: &dyn std::fmt::Debug) {
        let mut text = format!("{value:?}");
        if text.len() > TEXT_MAX {
            text = text.chars().take(TEXT_MAX).collect();
            text.push_str(" ...");
        }
        match field.name() {
            "message" => self.message = Some(text),
            _ => self.add(field, text.into()),
        }
    }

    fn record_str(&mut self, field: &Field, value: &str) {
        self.record_debug(field, &format_args!("{value}"));
    }

    fn record_u64(&mut self, field: &Field, value: u64) {
        self.add(field, value.into());
    }

    fn record_i64(&mut self, field: &Field, value: i64) {
        self.add(field, value.into());
    }

    fn record_f64(&mut self, field: &Field, value: f64) {
        self.add(field, value.into());
    }

    fn record_bool(&mut self, field: &Field, value: bool) {
        self.add(field, value.into());
    }
}

fn now() -> String {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    time(since.as_secs(), since.subsec_micros())
}

/// A time of UTC as RFC 3339 has it.
fn time(seconds: u64, micros: u32) -> String {
    format!("{}.{micros:06}Z", second(seconds))
}

/// The same without what follows the second; days by Hinnant's `civil_from_days`.
pub(super) fn second(seconds: u64) -> String {
    let (days, second) = (seconds / 86_400 + 719_468, seconds % 86_400);
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted = (5 * day_of_year + 2) / 153;
    let (day, month) = (day_of_year - (153 * shifted + 2) / 5 + 1, (shifted + 2) % 12 + 1);
    let year = year_of_era + era * 400 + u64::from(month <= 2);
    let (hour, minute, second) = (second / 3600, second / 60 % 60, second % 60);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        for (seconds, text) in [
            (0, "1970-01-01T00:00:00.000007Z"),
            (951_782_399, "2000-02-28T23:59:59.000007Z"),
            (951_782_400, "2000-02-29T00:00:00.000007Z"),
            (1_709_251_200, "2024-03-01T00:00:00.000007Z"),
            (4_102_444_799, "2099-12-31T23:59:59.000007Z"),
        ] {
            assert_eq!(time(seconds, 7), text);
        }
    }

    #[test]
    fn parts_are_named_by_what_tells_them_apart() {
        assert_eq!(part("pageferry::cli::vm::server"), "vm::server");
        assert_eq!(part("transport::engine::source"), "engine::source");
        assert_eq!(part("transport::session"), "transport::session");
        assert_eq!(part("pageferry_transport::link"), "transport::link");
        assert_eq!(part("mio"), "mio");
        assert!(filter("transport=debug,info").unwrap().would_enable("transport::link", &Level::DEBUG));
        assert!(!filter("transport=debug,info").unwrap().would_enable("engine", &Level::DEBUG));
        for bad in ["", " ", "loud=x", "a=b=c"] {
            assert!(filter(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn a_line_stays_one_and_is_no_command_to_a_terminal() {
        let fields = Fields { message: Some("a\nb\x1b[2J".into()), named: vec![("peer".into(), 7.into())] };
        assert_eq!(fields.text(), "a\\nb\\u{1b}[2J peer=7");
    }
}
