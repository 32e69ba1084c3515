package tracker

import (
	"sync"
	"time"

	"github.com/hashicorp/golang-lru/v2/simplelru"
)

const (
	// questionBurst is how many questions one source may have origins asked at once, questionRate how many a second
	// after that. Only questions about digests that no origin knows count in the end: the others are refunded. An
	// honest node has few of them.
	questionBurst = 100
	questionRate  = 20
	// maxQuestioners bounds the sources whose questions are counted.
	maxQuestioners = 10_000
)

// questions bounds how many questions at origins one source can cause by naming digests.
type questions struct {
	mu   sync.Mutex
	left *simplelru.LRU[sourceKey, *allowance]
}

type allowance struct {
	tokens float64
	at     time.Time
}

func newQuestions() *questions {
	left, _ := simplelru.NewLRU[sourceKey, *allowance](maxQuestioners, nil) // fails only for a size below one
	return &questions{left: left}
}

// take reports whether the source may cause one more question now.
func (q *questions) take(k sourceKey) bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	now := time.Now()
	a, ok := q.left.Get(k)
	if !ok {
		a = &allowance{tokens: questionBurst, at: now}
		q.left.Add(k, a)
	}
	a.tokens = min(questionBurst, a.tokens+now.Sub(a.at).Seconds()*questionRate)
	a.at = now
	if a.tokens < 1 {
		return false
	}
	a.tokens--
	return true
}

// refund takes back a question whose answer was worth asking.
func (q *questions) refund(k sourceKey) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if a, ok := q.left.Peek(k); ok {
		a.tokens = min(questionBurst, a.tokens+1)
	}
}
