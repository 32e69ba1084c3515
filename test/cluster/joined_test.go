package cluster

import (
	"bytes"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	scripted "kraken/test/upstream"
)

// callersOf starts a cluster whose only upstream is private, and knows two callers. get opens a blob of it at the
// agent.
func callersOf(t *testing.T, b []byte) (up *scripted.Registry, get func(user, password string) *http.Response) {
	t.Helper()
	up = scripted.New(t, scripted.Options{Basic: true, User: "first", Password: "secret", Others: map[string]string{"second": "other"}, TLS: true, Rate: 2 << 20})
	d := up.PutBlob(nginx, b).Digest
	c, repo := mirroring(t, 2, 1, up, map[string]any{
		"plain_http": false, "ca": up.CAFile, "modes": []any{map[string]any{"repository": "**", "mode": "caller"}},
	})
	return up, func(user, password string) *http.Response {
		t.Helper()
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, c.Agents[0].Base()+"/v2/"+repo+"/blobs/"+d.String(), nil)
		if err != nil {
			t.Error(err)
			return &http.Response{Body: http.NoBody}
		}
		if user != "" {
			req.SetBasicAuth(user, password)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			t.Error(err)
			return &http.Response{Body: http.NoBody}
		}
		t.Cleanup(func() { resp.Body.Close() })
		return resp
	}
}

// Callers share the bytes that are on their way, and not the permission: who joins another one's pull has been granted
// the blob by the upstream with what he showed himself, or gets nothing.
func TestWhoJoinsAPullIsAskedAbout(t *testing.T) {
	b := noise(4<<20, 41)
	up, get := callersOf(t, b)
	first := get("first", "secret")
	begin := make([]byte, 1000)
	if _, err := io.ReadFull(first.Body, begin); err != nil || first.StatusCode != http.StatusOK {
		t.Fatalf("the first caller: %s, %v", first.Status, err)
	}
	for _, no := range [][2]string{{"", ""}, {"second", "wrong"}, {"nobody", "secret"}} {
		resp := get(no[0], no[1])
		got, err := io.ReadAll(resp.Body)
		if err != nil || resp.StatusCode != http.StatusUnauthorized && resp.StatusCode != http.StatusForbidden || bytes.Contains(got, b[:16]) {
			t.Errorf("%q while the first one's pull is under way: %s, %d bytes, %v", no, resp.Status, len(got), err)
		}
	}
	asked := func(user string) (about, bytes int) {
		for _, q := range up.Requests() {
			switch {
			case q.User != user || q.Status/100 != 2:
			case q.Kind == "blob":
				bytes++
			default:
				about++
			}
		}
		return about, bytes
	}
	second := get("second", "other")
	if about, _ := asked("second"); about == 0 {
		t.Errorf("the second caller has an answer, %s, and the upstream was not asked about him: %+v", second.Status, up.Requests())
	}
	got, err := io.ReadAll(second.Body)
	if err != nil || !bytes.Equal(got, b) {
		t.Errorf("the second caller: %s, %d of %d bytes, %v", second.Status, len(got), len(b), err)
	}
	if rest, err := io.ReadAll(first.Body); err != nil || !bytes.Equal(append(begin, rest...), b) {
		t.Errorf("the first caller: %d bytes, %v", len(begin)+len(rest), err)
	}
	if _, n := asked("second"); n != 0 {
		t.Errorf("the bytes that were on their way were asked for %d times more", n)
	}
}

// What the upstream refuses one caller in the middle of a pull is no fault of another one who has joined it: he gets
// the rest with what he has shown himself.
func TestWhoJoinsAPullGoesOnWithoutItsBeginner(t *testing.T) {
	b := noise(4<<20, 42)
	up, get := callersOf(t, b)
	up.Fail(scripted.Rule{Kind: "blob", User: "first", Status: http.StatusUnauthorized})
	up.Fail(scripted.Rule{Kind: "blob", User: "first", Times: 1, Cut: true, CutAt: 2 << 20})
	first := get("first", "secret")
	if _, err := io.ReadFull(first.Body, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	second := get("second", "other")
	began := time.Now()
	got, err := io.ReadAll(second.Body)
	if err != nil || second.StatusCode != http.StatusOK || !bytes.Equal(got, b) {
		t.Errorf("the second caller: %s, %d of %d bytes after %s, %v", second.Status, len(got), len(b), time.Since(began).Round(time.Millisecond), err)
	}
	if rest, err := io.ReadAll(first.Body); err == nil {
		t.Errorf("the first caller, who is refused, got all: %d bytes", len(rest))
	}
}

// The same where the beginner is refused before a byte came.
func TestWhoJoinsAPullWithoutBytes(t *testing.T) {
	b := noise(3<<20, 43)
	up, get := callersOf(t, b)
	up.Fail(scripted.Rule{Kind: "blob", User: "first", Delay: time.Second, Status: http.StatusForbidden})
	status := make(chan int, 1)
	go func() { status <- get("first", "secret").StatusCode }()
	Eventually(t, time.Minute, func() error {
		for _, q := range up.Requests() {
			if q.Kind == "blob" && q.User == "first" {
				return nil
			}
		}
		return errors.New("the first caller's pull has not begun")
	})
	second := get("second", "other")
	if got, err := io.ReadAll(second.Body); err != nil || second.StatusCode != http.StatusOK || !bytes.Equal(got, b) {
		t.Errorf("the second caller: %s, %d of %d bytes, %v", second.Status, len(got), len(b), err)
	}
	if got := <-status; got == http.StatusOK {
		t.Errorf("the first caller, who is refused: %d", got)
	}
}
