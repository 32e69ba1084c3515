package transport

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strconv"
)

// WriteJSON answers with a status and v as JSON, of the media type application/json unless the header has one. An error
// says that v can't be encoded; then nothing was written. A client that has gone away is told nothing, and is no error.
func WriteJSON(w http.ResponseWriter, status int, v any) error {
	b, err := json.Marshal(v)
	if err != nil {
		return fmt.Errorf("encode the answer: %w", err)
	}
	h := w.Header()
	if h.Get("Content-Type") == "" {
		h.Set("Content-Type", "application/json")
	}
	h.Set("Content-Length", strconv.Itoa(len(b)))
	w.WriteHeader(status)
	w.Write(b) // an error here is a client that went away
	return nil
}

// ServeJSON is WriteJSON where nobody else answers what can't be encoded: with 500.
func ServeJSON(w http.ResponseWriter, status int, v any) {
	if err := WriteJSON(w, status, v); err != nil {
		http.Error(w, err.Error(), http.StatusInternalServerError)
	}
}
