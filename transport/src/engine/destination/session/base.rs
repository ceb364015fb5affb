//! What the destination tells the source of an older copy that it has of the guest.

use std::sync::atomic::Ordering;

use pagecopy::bitmap::bits;

use super::{IncomingError, Session};
use crate::engine::destination::environment::{Environment, Speaks};
use crate::wire::control::{BASE_CHUNKS_MAX, Base, BaseChunk, Message};

impl<E: Environment> Session<'_, E> {
    /// Says what the copy holds where the source may have data, as far as it can be read. What it takes on the way is bounded by one
    /// message.
    pub(super) async fn say_base(&mut self) -> Result<(), IncomingError> {
        let Some(base) = self.sink.base().cloned() else { return Ok(()) };
        let (seed, mut chunks) = (base.seed(), Vec::new());
        let (mut unread, mut why) = (0, None);
        for chunk in 0..self.ram.layout().chunks() {
            if self.hello.present(chunk) {
                match base.seals(chunk) {
                    Ok((0, _)) => {}
                    Ok((pages, seals)) => {
                        let seals = bits(pages).map(|bit| seals[bit as usize]).collect();
                        chunks.push(BaseChunk { chunk, pages, seals });
                    }
                    Err(error) => (unread, why) = (unread + 1, Some(error)),
                }
            }
            if chunks.len() == BASE_CHUNKS_MAX {
                self.say_chunks(seed, std::mem::take(&mut chunks)).await?;
            }
        }
        if let Some(why) = why {
            self.tell(&format!("{unread} chunks of the base cannot be read, and come whole: {why}"));
        }
        if !chunks.is_empty() {
            self.say_chunks(seed, chunks).await?;
        }
        Ok(())
    }

    async fn say_chunks(&mut self, seed: u64, chunks: Vec<BaseChunk>) -> Result<(), IncomingError> {
        self.send(Message::Base(Base { seed, chunks }));
        self.hear().await?;
        while self.link.as_ref().is_some_and(Speaks::is_sending) {
            self.hear().await?;
        }
        Ok(())
    }

    /// Whoever gave the copy is to know where it is not what it was.
    pub(super) fn tell_of_base(&self) {
        let lacking = self.sink.received().same_lacking.load(Ordering::Relaxed);
        if lacking != 0 {
            self.tell(&format!(
                "{lacking} pages of the base could not be read, or were not what they were: they were sent instead"
            ));
        }
    }
}
