//! A bounded pool for work that would hold up an I/O thread: templates, tokenization, block hashing.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use quire_core::RequestError;
use tokio::sync::Semaphore;

/// At most `threads` jobs run at once, at most `max_waiting` more wait; the rest is refused.
pub(crate) struct Pool {
    permits: Arc<Semaphore>,
    waiting: AtomicU32,
    max_waiting: u32,
}

/// One place in the queue, given back however the wait ends.
struct Place<'a>(&'a AtomicU32);

impl Drop for Place<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Pool {
    pub(crate) fn new(threads: usize, max_waiting: u32) -> Self {
        Self { permits: Arc::new(Semaphore::new(threads.max(1))), waiting: AtomicU32::new(0), max_waiting }
    }

    /// Runs `job` on a blocking thread of the current runtime. If the caller goes away while the job waits it never
    /// runs; once it runs it runs to its end, and keeps its place until then.
    ///
    /// # Errors
    /// [`RequestError::Overloaded`] when too many jobs wait, [`RequestError::Internal`] when the job panicked.
    pub(crate) async fn run<T: Send + 'static>(
        &self,
        job: impl FnOnce() -> T + Send + 'static,
    ) -> Result<T, RequestError> {
        let permit = {
            let place = self.queue()?;
            let permit = Arc::clone(&self.permits).acquire_owned().await;
            drop(place);
            permit.expect("the semaphore is never closed")
        };
        let job = tokio::task::spawn_blocking(move || {
            let _permit = permit;
            job()
        });
        job.await.map_err(|_| RequestError::Internal("the request could not be prepared".into()))
    }

    fn queue(&self) -> Result<Place<'_>, RequestError> {
        let queued = self.waiting.fetch_add(1, Ordering::Relaxed);
        let place = Place(&self.waiting);
        if queued < self.max_waiting {
            return Ok(place);
        }
        Err(RequestError::Overloaded { queued, limit: self.max_waiting, retry_after: Duration::from_secs(1) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_panic_fails_its_own_job_only() {
        let pool = Pool::new(1, 1);
        let failed = pool.run(|| panic!("on purpose")).await;
        assert!(matches!(failed, Err(RequestError::Internal(_))), "{failed:?}");
        assert_eq!(pool.run(|| 5).await, Ok(5));
    }

    #[tokio::test]
    async fn waiting_jobs_are_bounded_and_leave_when_their_caller_does() {
        let pool = Arc::new(Pool::new(1, 1));
        let (release, blocked) = std::sync::mpsc::channel::<()>();
        let running = tokio::spawn({
            let pool = Arc::clone(&pool);
            async move { pool.run(move || blocked.recv().is_ok()).await }
        });
        while pool.permits.available_permits() > 0 {
            tokio::task::yield_now().await;
        }
        let mut waiting = Box::pin(pool.run(|| 1));
        let poll = std::future::poll_fn(|cx| std::task::Poll::Ready(waiting.as_mut().poll(cx).is_pending()));
        assert!(poll.await);
        assert!(matches!(pool.run(|| 2).await, Err(RequestError::Overloaded { queued: 1, limit: 1, .. })));
        drop(waiting);
        assert_eq!(pool.waiting.load(Ordering::Relaxed), 0);
        release.send(()).unwrap();
        assert_eq!(running.await.unwrap(), Ok(true));
    }
}
