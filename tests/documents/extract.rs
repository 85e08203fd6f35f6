//! The commands of the documents: what stands between ```` ```sh ```` and ```` ``` ````.

use std::fs;
use std::path::{Path, PathBuf};

/// One command, with its continuation lines.
#[derive(Debug, Clone)]
pub(crate) struct Command {
    /// The document and the line, for messages.
    pub(crate) place: String,
    /// Without its comment.
    pub(crate) text: String,
}

/// The commands that stand between one pair of fences.
pub(crate) type Block = Vec<Command>;

pub(crate) fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// The documents whose commands are tried: all that tell how Pollux is used.
pub(crate) fn documents() -> Vec<PathBuf> {
    let docs = fs::read_dir(root().join("docs")).unwrap();
    let docs = docs.map(|entry| entry.unwrap().path());
    let mut found: Vec<PathBuf> = docs
        .filter(|path| path.extension().is_some_and(|extension| extension == "md"))
        .collect();
    found.sort();
    found.extend(["README.md", "qemu/README.md"].map(|name| root().join(name)));
    found
}

/// All blocks of commands of a document.
pub(crate) fn blocks(path: &Path) -> Vec<Block> {
    let name = path.strip_prefix(root()).unwrap().display();
    let text = fs::read_to_string(path).unwrap();
    let (mut blocks, mut block, mut language) = (Vec::new(), Block::new(), None);
    let mut open = String::new();
    for (number, line) in (1..).zip(text.lines()) {
        if let Some(fence) = line.strip_prefix("```") {
            match language.take() {
                // Whoever adds a block says what it is; commands that nobody runs would else look
                // like a drawing.
                None => {
                    assert!(
                        ["sh", "xml", "text", "json"].contains(&fence),
                        "{name}:{number}: a block says sh, xml, text or json, not {fence:?}"
                    );
                    language = Some(fence);
                }
                Some("sh") => blocks.push(std::mem::take(&mut block)),
                Some(_) => {}
            }
            continue;
        }
        if language != Some("sh") {
            continue;
        }
        let line = without_comment(line);
        if let Some(part) = line.strip_suffix('\\') {
            open += part;
            continue;
        }
        let whole = open.clone() + line;
        open.clear();
        let text = whole.split_whitespace().collect::<Vec<_>>().join(" ");
        if !text.is_empty() {
            let place = format!("{name}:{number}");
            block.push(Command { place, text });
        }
    }
    assert_eq!(language, None, "{name}: a block has no end");
    blocks
}

/// A `#` begins a comment at the start of a line or behind a space, but not within quotes.
fn without_comment(line: &str) -> &str {
    let (mut quote, mut before) = (None, ' ');
    for (at, character) in line.char_indices() {
        match (quote, character) {
            (None, '#') if before.is_whitespace() => return line[..at].trim_end(),
            (None, '\'' | '"') => quote = Some(character),
            (Some(open), _) if open == character => quote = None,
            _ => {}
        }
        before = character;
    }
    line.trim_end()
}

#[test]
fn comments_end_commands_and_quotes_protect_them() {
    for (line, command) in [
        ("pollux trace vm1   # what becomes", "pollux trace vm1"),
        ("# all of it", ""),
        ("echo 'a # b' \"c # d\" # e", "echo 'a # b' \"c # d\""),
        ("echo a#b", "echo a#b"),
        ("curl x \\", "curl x \\"),
    ] {
        assert_eq!(without_comment(line), command);
    }
}
