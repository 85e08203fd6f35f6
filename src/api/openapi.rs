//! The OpenAPI description, generated from the types and routes and committed as
//! `docs/openapi.json`; a test keeps the two equal.

use utoipa::OpenApi;

use super::routes::Documentation;

/// Returns the description as JSON text.
pub fn document() -> String {
    let mut text = serde_json::to_string_pretty(&Documentation::openapi()).unwrap_or_default();
    text.push('\n');
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn committed_description_is_current() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/docs/openapi.json");
        if std::env::var_os("POLLUX_BLESS").is_some() {
            std::fs::write(path, document()).unwrap();
        }
        let committed = std::fs::read_to_string(path).unwrap_or_default();
        assert!(
            committed == document(),
            "docs/openapi.json is not what the types say; regenerate it with: \
             POLLUX_BLESS=1 cargo test openapi"
        );
    }

    #[test]
    fn description_names_every_route_and_schema_it_refers_to() {
        let document: serde_json::Value = serde_json::from_str(&document()).unwrap();
        for path in [
            "/v1/version",
            "/v1/ports",
            "/v1/ports/{name}",
            "/v1/fdb",
            "/v1/poll",
            "/v1/stats",
            "/v1/events",
            "/v1/openapi.json",
        ] {
            assert!(document["paths"][path].is_object(), "{path}");
        }
        let text = document.to_string();
        let schemas = &document["components"]["schemas"];
        let prefix = "#/components/schemas/";
        for (at, _) in text.match_indices(prefix) {
            let name = text[at + prefix.len()..].split('"').next().unwrap();
            assert!(
                schemas[name].is_object(),
                "{name} is referred to, not described"
            );
        }
    }
}
