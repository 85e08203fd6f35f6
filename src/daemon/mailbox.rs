//! The content of the mailbox between a session and control. Decisions only, made under the lock of
//! `link`, so that the model checker runs this file unchanged (`tests/models`).

/// The state of a session's posts.
#[derive(Debug)]
pub(super) struct Mailbox<D> {
    /// The newest post, until control takes it.
    device: Option<Option<D>>,
    posted: u64,
    /// The newest post that is published, and the generation that holds it.
    published: u64,
    generation: u64,
    /// Whether control has been told of a post that it has not taken yet.
    announced: bool,
    /// Whether the port was removed.
    gone: bool,
}

impl<D> Default for Mailbox<D> {
    fn default() -> Self {
        Mailbox {
            device: None,
            posted: 0,
            published: 0,
            generation: 0,
            announced: false,
            gone: false,
        }
    }
}

impl<D> Mailbox<D> {
    /// Posts the session's newest device. Returns the number of the post, and whether control must
    /// be told.
    pub(super) fn post(&mut self, device: Option<D>) -> (u64, bool) {
        self.posted += 1;
        if self.gone {
            return (self.posted, false);
        }
        self.device = Some(device);
        let announce = !std::mem::replace(&mut self.announced, true);
        (self.posted, announce)
    }

    /// Returns the newest post that control has not taken yet: its number and device.
    pub(super) fn take(&mut self) -> Option<(u64, Option<D>)> {
        self.announced = false;
        let device = self.device.take()?;
        Some((self.posted, device))
    }

    /// Control reports the generation in which a post is published.
    pub(super) fn published(&mut self, post: u64, generation: u64) {
        if post >= self.published {
            self.published = post;
            self.generation = generation;
        }
    }

    /// Control reports that the port is removed since `generation`. Later posts have no effect.
    pub(super) fn port_gone(&mut self, generation: u64) {
        self.gone = true;
        self.device = None;
        self.generation = generation;
    }

    /// Returns the generation that all poll threads must have adopted before the post is done.
    /// `None` while that generation is not known.
    pub(super) fn answer(&self, post: u64) -> Option<u64> {
        (self.published >= post || self.gone).then_some(self.generation)
    }

    /// Whether the port was removed.
    pub(super) fn is_gone(&self) -> bool {
        self.gone
    }
}
