//! The template engine, set up as `transformers` sets up Jinja2.

use std::sync::Arc;
use std::time::SystemTime;

use minijinja::syntax::SyntaxConfig;
use minijinja::value::{Kwargs, Rest, Serde, Value};
use minijinja::{Environment, Error, ErrorKind};

use super::generation::{self, Marker};
use super::{ChatRequest, RenderedChat, json, python};

/// Steps that a template may take. Templates come with models from strangers; the longest honest ones take some thousand a
/// message.
const FUEL: u64 = 50_000_000;

/// Other names under which a message's reasoning is passed; templates read the first.
const REASONING_FIELDS: [&str; 3] = ["reasoning_content", "thinking", "reasoning"];

pub(super) fn render(
    source: &str,
    request: &ChatRequest,
    special_tokens: &[(&str, &str)],
) -> Result<RenderedChat, String> {
    let rewritten = generation::rewrite(source);
    let mut env = environment(request.now);
    let variables = variables(request, special_tokens);
    let mut marker = None;
    if rewritten.is_some() {
        let inputs = serde_json::to_string(&variables).map_err(|error| error.to_string())?;
        let found = Marker::absent_from(&[source, &inputs])
            .ok_or("the messages contain every Unicode noncharacter; remove those characters")?;
        env.add_filter(generation::FILTER, move |text: String| found.wrap(&text));
        marker = Some(found);
    }
    let template = env
        .template_from_str(rewritten.as_deref().unwrap_or(source))
        .map_err(|error| explain(&error))?;
    let text = template
        .render(Value::from(Serde(&variables)))
        .map_err(|error| explain(&error))?;
    Ok(match marker {
        None => RenderedChat {
            text,
            assistant: Vec::new(),
        },
        Some(marker) => {
            let (text, assistant) = marker.extract(&text);
            RenderedChat { text, assistant }
        }
    })
}

/// What the template sees. Tools and documents are there even without a value, since templates compare them with `none`.
fn variables(
    request: &ChatRequest,
    special_tokens: &[(&str, &str)],
) -> serde_json::Map<String, serde_json::Value> {
    let mut variables = serde_json::Map::new();
    for (name, token) in special_tokens {
        variables.insert((*name).into(), (*token).into());
    }
    variables.insert(
        "messages".into(),
        request.messages.iter().map(with_reasoning).collect(),
    );
    variables.insert("tools".into(), request.tools.clone().into());
    variables.insert("documents".into(), request.documents.clone().into());
    variables.insert(
        "add_generation_prompt".into(),
        request.add_generation_prompt.into(),
    );
    variables.extend(request.variables.clone());
    variables
}

/// The message with its reasoning under every name that templates may read.
fn with_reasoning(message: &serde_json::Value) -> serde_json::Value {
    let Some(fields) = message.as_object() else {
        return message.clone();
    };
    let reasoning = REASONING_FIELDS
        .iter()
        .find_map(|name| fields.get(*name).filter(|value| !value.is_null()));
    let Some(reasoning) = reasoning.cloned() else {
        return message.clone();
    };
    let mut fields = fields.clone();
    fields
        .entry("thinking")
        .or_insert_with(|| reasoning.clone());
    fields.insert("reasoning_content".into(), reasoning);
    fields.into()
}

fn environment(now: Option<SystemTime>) -> Environment<'static> {
    let mut env = Environment::new();
    let syntax = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    env.set_syntax(syntax.expect("the engine's own delimiters are valid"));
    env.set_fuel(Some(FUEL));
    env.set_unknown_method_callback(minijinja_contrib::pycompat::unknown_method_callback);
    env.set_formatter(|out, _state, value| {
        let text = python::text(value);
        std::fmt::Write::write_str(out, &text).map_err(Error::from)
    });
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| python::text(value));
    env.add_function(
        "raise_exception",
        |message: String| -> Result<Value, Error> {
            Err(
                Error::new(ErrorKind::InvalidOperation, "refused by the template")
                    .with_source(Raised(message)),
            )
        },
    );
    let now = Arc::new(now);
    env.add_function("strftime_now", move |format: String| {
        strftime(now.unwrap_or_else(SystemTime::now), &format)
    });
    env
}

/// What a template said when it called `raise_exception`.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Raised(String);

/// The whole story of a template error on one line: the template's own words, or what went wrong and where.
fn explain(error: &Error) -> String {
    let mut source = std::error::Error::source(error);
    while let Some(cause) = source {
        if let Some(Raised(message)) = cause.downcast_ref() {
            return format!("refuses this conversation: {message}");
        }
        source = cause.source();
    }
    if error.kind() == ErrorKind::OutOfFuel {
        return format!("took more than {FUEL} steps; it does not seem to end");
    }
    error.to_string()
}

/// `json.dumps(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False)`.
fn tojson(value: Value, positional: Rest<Value>, kwargs: Kwargs) -> Result<Value, Error> {
    let option = |index: usize, name: &str| -> Result<Value, Error> {
        match positional.get(index) {
            Some(value) => Ok(value.clone()),
            None => Ok(kwargs.get::<Option<Value>>(name)?.unwrap_or_default()),
        }
    };
    let separators = option(2, "separators")?;
    let style = json::Style {
        ensure_ascii: option(0, "ensure_ascii")?.is_true(),
        indent: indent(&option(1, "indent")?)?,
        separators: if separators.is_none() || separators.is_undefined() {
            None
        } else {
            Some((
                python::text(&separators.get_item_by_index(0)?),
                python::text(&separators.get_item_by_index(1)?),
            ))
        },
        sort_keys: option(3, "sort_keys")?.is_true(),
    };
    kwargs.assert_all_used()?;
    json::dumps(&value, &style).map(Value::from_safe_string)
}

fn indent(value: &Value) -> Result<Option<String>, Error> {
    if value.is_none() || value.is_undefined() {
        return Ok(None);
    }
    match (value.as_str(), value.as_i64()) {
        (Some(text), _) => Ok(Some(text.into())),
        (None, Some(width)) if width <= 64 => {
            Ok(Some(" ".repeat(usize::try_from(width).unwrap_or(0))))
        }
        _ => Err(Error::new(
            ErrorKind::InvalidOperation,
            format!("tojson: indent={value}, expected a width up to 64 or a text"),
        )),
    }
}

/// The local time in the words of C's `strftime`.
fn strftime(now: SystemTime, format: &str) -> Result<String, Error> {
    let fail = |error: jiff::Error| {
        Error::new(
            ErrorKind::InvalidOperation,
            format!("strftime_now(`{format}`): {error}"),
        )
    };
    let timestamp = jiff::Timestamp::try_from(now).map_err(fail)?;
    let local = timestamp.to_zoned(jiff::tz::TimeZone::system());
    jiff::fmt::strtime::format(format, &local).map_err(fail)
}
