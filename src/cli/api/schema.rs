//! The schema of what goes over a control socket, from the types.

use pageferry::engine::plan::Plan;
use schemars::generate::SchemaSettings;
use serde_json::{Value, json};

use super::{Answer, Request, VmStatus};

/// One JSON schema (draft 2020-12): a line is a request or an answer. `returns` says what the answers' `return` is, by the request; of
/// requests that are not in it, null.
pub(in super::super) fn document() -> Value {
    let mut generator = SchemaSettings::draft2020_12().into_generator();
    let line = [generator.subschema_for::<Request>(), generator.subschema_for::<Answer>()];
    let (status, plan) = (generator.subschema_for::<VmStatus>(), generator.subschema_for::<Plan>());
    let mut types = Value::Object(generator.take_definitions(true));
    // As `Request::parse` has it. Answers may have fields that an older client does not know.
    for request in types["Request"]["oneOf"].as_array_mut().into_iter().flatten() {
        request["unevaluatedProperties"] = json!(false);
    }
    json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "A line of pageferry's control socket",
        "oneOf": line,
        "returns": { "status": status, "plan": plan },
        "$defs": types,
    })
}

/// The document as text.
pub(in super::super) fn text() -> String {
    let mut text = serde_json::to_string_pretty(&document()).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    /// What a schema of `schema`'s document says of its own properties, and of those it refers to.
    fn properties(document: &Value, schema: &Value) -> BTreeSet<String> {
        let own = schema["properties"].as_object().into_iter().flat_map(|fields| fields.keys().cloned());
        let referred = schema["$ref"].as_str().and_then(|place| document.pointer(place.strip_prefix('#')?));
        own.chain(referred.map(|schema| properties(document, schema)).into_iter().flatten()).collect()
    }

    #[test]
    fn a_request_has_the_fields_of_its_schema_and_no_others() {
        let document = document();
        let requests = document["$defs"]["Request"]["oneOf"].as_array().unwrap();
        let names: Vec<_> = requests
            .iter()
            .map(|request| {
                let name = request["properties"]["execute"]["const"].as_str().unwrap();
                let uri_and_more = r#""uri":"unix:/x","link":1,"file":"/x","seconds":1,"interval_ms":10"#;
                // The fields that it must have are among these; which others it knows it says itself.
                let all: serde_json::Map<_, _> =
                    serde_json::from_str(&format!(r#"{{"execute":"{name}",{uri_and_more}}}"#)).unwrap();
                let known = properties(&document, request);
                let own: serde_json::Map<_, _> =
                    all.into_iter().filter(|(field, _)| known.contains(field)).collect();
                let parsed = Request::parse(Value::Object(own).to_string().as_bytes()).unwrap();
                assert_eq!(parsed.fields().into_iter().collect::<BTreeSet<_>>(), known, "{name}");
                assert_eq!(request["unevaluatedProperties"], false, "{name}");
                name.to_owned()
            })
            .collect();
        assert_eq!(names.len(), 13, "{names:?}");
    }
}
